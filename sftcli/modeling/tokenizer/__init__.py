"""Text -> tokens, and conversations -> text.

``chat_tokenizer`` is the front: ``files`` reads what a folder says, ``special_tokens`` finds which tokens mean
something to the model, ``template`` runs chat templates in the ``sandbox``, and ``builtin_templates`` has those of
models without one.
"""
