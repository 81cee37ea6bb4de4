#!/usr/bin/env bash
# transformers 5.24.0 with jinja2 3.1.6, 2026-11-28.
# {% generation %} tells apply_chat_template(return_assistant_tokens_mask=True) what the
# assistant has said. Where the tag stands in a macro, in {% set x %}...{% endset %} or in
# {% filter %}, its text is counted from the place where the macro's output begins: what the
# template writes before the tag is taken for the answer, and as much of its end is lost.
# The ids are right, and there is no word.
# Why it matters: a model is trained on the header of its turns, and never on where to stop.
# Upstream: not searched for.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq transformers==5.24.0 jinja2==3.1.6 tokenizers==0.23.3
cd "$tmp"
cat > seen.py <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytewise.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)

answer = "<bot>{% generation %}{{ m.content }}.{% endgeneration %}"
chat = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}HERE{% endif %}{% endfor %}"
templates = {
    "plain": chat.replace("HERE", answer),
    "macro": "{% macro say(m) %}" + answer + "{% endmacro %}" + chat.replace("HERE", "{{ say(m) }}"),
    "set": chat.replace("HERE", "{% set x %}" + answer + "{% endset %}{{ x }}"),
    "filter": chat.replace("HERE", "{% filter trim %}" + answer + "{% endfilter %}"),
}
messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "I am fine"}]
for name, template in templates.items():
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    learned = tokenizer.decode([i for i, one in zip(ids, mask) if one])
    print(f"{name:7} {tokenizer.decode(ids)}   learned: {learned}")
    assert tokenizer.decode(ids) == "[Hi?]<bot>I am fine."
    assert learned == ("I am fine." if name == "plain" else "<bot>I am "), learned
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
