"""The chat templates that can be chosen by name, for tokenizers that bring none.

``text_prefix`` is what the tokenizer puts in front of every text by itself, mostly nothing or its beginning-of-text
token. Every answer ends in a token that stops generation: ``<|im_end|>`` in ChatML, end-of-text in the plain formats.
"""

# One line a statement; the dashes take away the line ends between them.
CHATML = """\
{{- text_prefix }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# System text becomes the instruction of a first turn that has an input, as in the files this format comes from.
ALPACA = """\
{{- text_prefix }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'tool' %}
{{- '### Input:\\n' + message['content'] + '\\n\\n' }}
{%- else %}
{{- '### Response:\\n' + message['content'] + eos_token }}
{{- '\\n\\n' if add_generation_prompt or not loop.last }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""

# The space behind "Response:" belongs to the answer: tokens of pretraining text carry their space in front.
MODERN_LLM = """\
{{- text_prefix }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- 'Response: ' + message['content'] + eos_token }}
{{- '\\n\\n' if add_generation_prompt or not loop.last }}
{%- elif message['role'] == 'user' %}
{{- 'Instruction: ' + message['content'] + '\\n\\n' }}
{%- else %}
{{- message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Response:' }}
{%- endif %}
"""

BUILTIN_TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "modern-llm": MODERN_LLM}
NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
STOP_TOKENS = {"chatml": ("<|im_end|>",)}  # beside those that the tokenizer and the generation settings name
