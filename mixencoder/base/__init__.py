"""What all six architectures share.

The encoder under them (`backbones`, `modeling`, `heads`, `configuration`), checkpoints (`checkpoints`), texts and their
tokens (`texts`, `empty_texts`, `tokenization`), encoding (`encoder_passes`, `threads`), and what users call (`engine`,
`model_holder`, `results`, `inputs`, `notices`).
"""
