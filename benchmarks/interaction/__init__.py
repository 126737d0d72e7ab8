"""What makes the interaction learn: variants tried on the encodings of a frozen encoder, made once.

`features` encodes the texts, `variants` names what is tried, `learning` trains and measures one variant, and
``python -m benchmarks.interaction`` runs them and writes the records.
"""
