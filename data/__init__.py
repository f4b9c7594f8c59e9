"""From annotation files to tensors: index, mixture, packing, step plan and loader; nothing of training."""
