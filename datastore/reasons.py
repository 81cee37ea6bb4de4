"""Every reason for which an ingest does not take something: what it means, in a sentence.

A record is *rejected* if it should have given a document and could not: it is counted against the limit, and kept aside. A file,
or a record of an archive, is *left out* if it is none that is meant: it is counted, and that is all. `datastore explain REASON` prints
what stands here, and `docs/troubleshooting.md` is made of it; a test holds the names against those that the ingest has.
"""

__all__ = ["LEFT_OUT", "REJECTED"]

REJECTED = {
    "bad_message": "A message of a chat has no role, or nothing in it.",
    "bad_record": "An archive has no record there, or one of another length than it says.",
    "bad_tools": "`tools` of a chat is no list of objects, nor the JSON of one.",
    "bomb": "The compressed file grows more than `max_expansion` times (200); what came before is kept.",
    "content_not_text": "The content of a message is something else than one text.",
    "corrupt_stream": "The compressed file is damaged; what came before is kept.",
    "digest_mismatch": "A record of an archive is not what its digest says.",
    "duplicate_id": "An earlier document of this ingest has the id; the first one stays.",
    "empty_text": "The text is empty.",
    "id_not_text": "The id is neither a text nor a whole number.",
    "invalid_json": "The line is no JSON, or no object. If it is plain text, say so: `--as lines` or `--as text`.",
    "invalid_utf8": "A byte that is no UTF-8. Nothing is replaced or guessed; convert the file first.",
    "lone_surrogate": "Half of a surrogate pair stands in the text: whoever wrote it has cut a character.",
    "mask_unknown": "The template rewrites earlier turns, or marks not as many answers as there are.",
    "message_dropped": "A message, a call or a tool is not in the text that the template made.",
    "missing_text": "The record has no text under the key that is looked for; `--text-key` names another one.",
    "no_answer": "The assistant says nothing, so there is nothing to learn; or both sides of a pair are the same.",
    "no_messages": "The record has no `messages` or `conversations`, or none in it; of a pair, one side is missing.",
    "no_tokens": "The tokenizer made nothing of the text.",
    "nul": "A null character stands in the text.",
    "null_text": "The text is null.",
    "pair_disagrees": "`chosen` or `rejected` begins with a user, and does not have the prompt in it.",
    "special_token": "The text spells a special token, and `special_tokens` is `reject`.",
    "template_refused": "The chat template raised an error, for a role that it does not know, say.",
    "text_lost": "The tokens do not give back the text that they were made of.",
    "text_not_string": "What stands under the key of the text is a number, a list or an object.",
    "token_out_of_range": "An id lies beyond the vocabulary of the tokenizer.",
    "too_long": "The record is longer than `max_document_bytes` (16 MiB).",
    "truncated": "The compressed file or the archive ends early; what came before is kept.",
    "unknown_encoding": "A page is packed in a way that nothing here can undo.",
}
"""Why a record was rejected."""

LEFT_OUT = {
    "about_records": "A record of an archive says how it was made, or what was asked for.",
    "beside_dataset": "It lies in the folder of another library's dataset, and is not of it.",
    "binary": "It is no text.",
    "dataset": "It is a folder of ours, perhaps the target itself.",
    "empty": "The file has nothing in it.",
    "encrypted": "A member of a zip archive has a password.",
    "excluded": "`--exclude` names it, or `--include` does not.",
    "hidden": "Its name begins with a dot. Name the file itself to take it.",
    "http_status": "The page is an answer that is no success.",
    "ignored": "git ignores it, and `--gitignore` was given.",
    "nested_archive": "It is an archive in an archive. Unpack the outer one first.",
    "no_text_column": "It is a table without a column of text, among texts. `--text-key` names the column.",
    "not_text": "A record of an archive is an image, say.",
    "odd_name": "The name has bytes that are no UTF-8, a backslash or a control character, or leads out of the archive.",
    "outside_root": "It is a link to something outside of the folder.",
    "revisit": "A record of an archive stands for a page that another record has.",
    "special_file": "It is a pipe, a socket or a device.",
    "symlink": "It is a link to a file of the same folder, which is read under its own name; or it leads in a circle.",
}
"""Why a file, or a record of an archive, was left out."""
