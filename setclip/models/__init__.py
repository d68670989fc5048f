"""Models: CLIP towers (`clip`). The JSON files here are small ones, named like open_clip's own."""
