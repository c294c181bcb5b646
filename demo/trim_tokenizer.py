"""Trims CLIP's tokenizer to the words of the demo's captions: the same tokens, 22 kB instead of 1.5 MB.

Reads:   a folder of CLIP's tokenizer, prompts/demo.json, demo/wordings.json
Writes:  demo/models/t2v/tokenizer
Run:     python demo/trim_tokenizer.py FOLDER
Cost:    a second
Expect:  the tokenizer of the repository
"""

import argparse
import json
from pathlib import Path

from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT_LENGTH = 24  # tokens, as in demo/train_models.py


def trim_tokenizer(source, texts, out):
    """Writes CLIP's tokenizer with only the merges that the words of `texts` need (and all single bytes)."""
    full = CLIPTokenizer.from_pretrained(source)
    lines = Path(source, "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1:] if line]
    rank = {pair: i for i, pair in enumerate(merges)}
    words = sorted({token for text in texts for token in text.lower().replace(",", " , ").split()})
    used = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            used.add(best)
            i = next(i for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair == best)
            parts[i : i + 2] = ["".join(best)]
    kept = sorted(used, key=rank.get)
    vocabulary = full.get_vocab()
    single = sorted((t for t in vocabulary if len(t.removesuffix("</w>")) == 1), key=vocabulary.get)
    tokens = [*single, *("".join(pair) for pair in kept), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    small = CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=TEXT_LENGTH)
    for text in texts:
        ours, theirs = (t.convert_ids_to_tokens(t(text).input_ids) for t in (small, full))
        assert ours == theirs, text
    small.save_pretrained(out)


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument(
        "source", type=Path, help="folder of CLIP's tokenizer, with vocab.json and merges.txt"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo/models/t2v/tokenizer", help="(the demo's)")
    args = parser.parse_args()
    sentences = json.loads((ROOT / "prompts/demo.json").read_text("utf-8"))
    others = json.loads((ROOT / "demo/wordings.json").read_text("utf-8"))
    trim_tokenizer(args.source, [*sentences.values(), *sum(others.values(), [])], args.out)


if __name__ == "__main__":
    main()
