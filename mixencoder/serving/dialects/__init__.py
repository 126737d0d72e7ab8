"""Request and response models of the endpoints, one file per dialect that clients speak.

`common` holds what they share, `error_forms` how each writes an error.
"""
