"""The rooms behind finetune_generation.py, data.py and utils.py, one subject a file."""
