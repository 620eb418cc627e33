"""The user's causal LMs: loading, hidden states and head, and weights in the form of a checkpoint."""
