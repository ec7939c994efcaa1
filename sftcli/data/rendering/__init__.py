"""Conversations -> token ids and loss mask, made together and proved row by row.

``conversation_shape`` takes a conversation apart, ``template_layout`` finds out once what the chat template makes of that
shape (``markers``, ``prompts``, ``segments``), ``draft`` puts the texts of a row into it, ``encode`` makes tokens of it,
``proofs`` checks what was made, and ``truncation`` cuts it. ``advice`` tries what would keep a row that is refused. ``render`` is
the front of all this, ``pretraining_text`` the way of texts without turns, and ``token_view`` shows a row to a person.
"""
