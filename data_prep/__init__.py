"""Data preparation: sources of images and captions, made into shards with parsed objects and their statistics."""
