"""Pretraining: losses, exact data order, the DeepSpeed engine and the loop."""
