#!/usr/bin/python3
"""Token ids of contexts that no calibration here has seen: unseen.json, and the texts in unseen/.

    data/texts/make_unseen.py MODEL     a Hugging Face directory; needs the Python package `tokenizers`

Three are of kinds of text that the calibration does not know. In the others the continuation copies a passage from the
middle of a context whose kind it knows: what a model needs its cache for.
"""
import json
import pathlib
import sys

import tokenizers

CONTEXT, CONTINUATION = 2048, 256
PASSAGE = 900  # where the copied passage begins
HERE = pathlib.Path(__file__).parent
SOURCES = {
    "mpl": "/usr/share/common-licenses/MPL-2.0",
    "gpl": "/usr/share/common-licenses/GPL-3",
    "format": HERE / "../../codec/FORMAT.md",
}
COPIED = ["handbook", "pycode"]

tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
contexts = {}
(HERE / "unseen").mkdir(exist_ok=True)
for name, path in SOURCES.items():
    text = pathlib.Path(path).read_text(encoding="utf-8")
    contexts[name] = tokenizer.encode(text, add_special_tokens=False).ids[:CONTEXT + CONTINUATION]
    if len(contexts[name]) < CONTEXT + CONTINUATION:
        sys.exit(f"{path}: too short")
    (HERE / "unseen" / f"{name}.txt").write_text(tokenizer.decode(contexts[name]), encoding="utf-8")
test = json.loads((HERE / "test.json").read_text())
for name in COPIED:
    context = test[name][:CONTEXT]
    contexts[f"{name}-copied"] = context + context[PASSAGE:PASSAGE + CONTINUATION]
(HERE / "unseen.json").write_text(json.dumps(contexts, separators=(",", ":")) + "\n")
