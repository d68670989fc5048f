"""Where images and captions come from; each source makes a `Plan` (plan.py) that `data_prep.run` carries out."""
