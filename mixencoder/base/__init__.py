"""What all six architectures share.

Encoder and heads (`backbones`, `modeling`, `configuration`), checkpoints (`checkpoints`), texts and their tokens
(`texts`, `empty_texts`, `tokenization`), encoding (`encoding`, `encoder_passes`, `threads`), and what users call
(`engine`, `model_holder`, `results`, `inputs`, `notices`).
"""
