"""Importing it registers the operators of torch.ops.evovlm; :mod:`evovlm.csrc.ops` documents them."""
