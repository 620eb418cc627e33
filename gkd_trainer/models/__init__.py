"""A causal LM from outside: loaded, taken apart, and its weights as a checkpoint would hold them."""
