"""Evaluation as pure functions over encode and score functions, and their commands. It knows nothing of trainers.

`eval_suite` imports only `setclip`; pretraining and fine-tuning import it, because they evaluate on their way.
"""
