"""Fine-tuning for retrieval: losses over scores of sets (`losses`)."""
