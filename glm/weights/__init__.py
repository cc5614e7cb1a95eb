"""What a model is made of: files of weights, model folders, adapters, the state of an optimizer."""
