#!/usr/bin/env bash
# gigatoken 0.10.0 with tokenizers 0.23.3, 2026-11-28.
# An added token with single_word=True is to be found only as a word of its own. gigatoken
# loads such a tokenizer.json without a word and finds the token inside other words too:
# "art" cuts "start" in pieces. tokenizers keeps "start" whole. lstrip and rstrip are minded.
# Why it matters: the ids of a dataset then depend on who encoded it, and a model is served
# with other ids than it was trained on.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq gigatoken==0.10.0 tokenizers==0.23.3
cd "$tmp"
cat > seen.py <<'PY'
import gigatoken
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
slow = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
slow.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
slow.add_tokens([AddedToken("art", single_word=True, normalized=False)])
fast = gigatoken.Tokenizer.from_json(slow.to_str())
token = slow.token_to_id("art")

for text, same in (("the art of", True), ("star", True), ("start", False), ("artists", False)):
    left, right = slow.encode(text).ids, [int(i) for i in fast.encode(text)]
    print(f"{text:11} tokenizers finds the token {left.count(token)} times,"
          f" gigatoken {right.count(token)}")
    assert (left == right) == same, text
PY
"$tmp/v/bin/python" seen.py
