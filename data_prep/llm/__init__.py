"""Questions to a language model, asked through vLLM or any OpenAI-compatible server; a run that is killed goes on.

`client.ask` is all that other modules need. Used by the commands that parse captions and describe objects.
"""
