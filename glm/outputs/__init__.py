"""What a run leaves in output_dir: names of files, atomic replacement, checkpoints."""
