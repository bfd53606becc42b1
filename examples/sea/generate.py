"""Writes the collection in this folder: the log of a German harbour, with English questions.

Run `python examples/sea/generate.py`; it writes the same files every time. A question and its
answer share only the name of a place, so an encoder finds little until it has learnt the words
from the training questions. The questions of the split `dev` are about other lines of the log.
"""

import json
import random
from pathlib import Path

PASSAGES, DEV = 600, 100
WHO = {
    "Der Lotse": "pilot",
    "Die Fischerin": "fisherwoman",
    "Der Kapitän": "captain",
    "Die Taucherin": "diver",
    "Der Zöllner": "customs officer",
    "Die Köchin": "cook",
    "Der Leuchtturmwärter": "lighthouse keeper",
    "Die Ärztin": "doctor",
    "Der Maschinist": "engineer",
    "Die Händlerin": "merchant",
    "Der Schiffsjunge": "cabin boy",
    "Die Malerin": "painter",
}
DOES = {
    "zählt": "counting",
    "verkauft": "selling",
    "findet": "finding",
    "repariert": "repairing",
    "zeichnet": "drawing",
    "versteckt": "hiding",
    "wiegt": "weighing",
    "reinigt": "cleaning",
    "verliert": "losing",
    "bewacht": "guarding",
}
WHAT = {
    "die Netze": "nets",
    "den Anker": "anchor",
    "die Segel": "sails",
    "den Kompass": "compass",
    "die Fässer": "barrels",
    "das Ruder": "rudder",
    "die Seekarten": "charts",
    "die Laterne": "lantern",
    "den Hering": "herring",
    "die Austern": "oysters",
    "das Tau": "rope",
    "die Glocke": "bell",
}
WHERE = {
    "auf Sylt": "Sylt",
    "auf Amrum": "Amrum",
    "vor Helgoland": "Helgoland",
    "auf Usedom": "Usedom",
    "in Kiel": "Kiel",
    "in Bremen": "Bremen",
    "bei Cuxhaven": "Cuxhaven",
    "in Rostock": "Rostock",
}
WHEN = {
    "am Morgen": "morning",
    "am Abend": "evening",
    "in der Nacht": "night",
    "bei Nebel": "fog",
    "bei Sturm": "storm",
    "bei Ebbe": "low tide",
}


def main() -> None:
    """Write corpus, queries and judgements in BEIR's layout."""
    chance = random.Random(1)
    folder = Path(__file__).parent
    kinds = (WHO, DOES, WHAT, WHERE, WHEN)
    lines: dict[tuple[str, ...], None] = {}
    while len(lines) < PASSAGES:
        lines[tuple(chance.choice(list(kind)) for kind in kinds)] = None
    corpus, queries = [], []
    qrels = {split: ["query-id\tcorpus-id\tscore"] for split in ("train", "dev")}
    for number, line in enumerate(lines, start=1):
        keywords = [kind[word] for kind, word in zip(kinds, line, strict=True)]
        chance.shuffle(keywords)
        corpus.append({"_id": f"p{number}", "title": "", "text": " ".join(line) + "."})
        queries.append({"_id": f"q{number}", "text": " ".join(keywords)})
        qrels["dev" if number <= DEV else "train"].append(f"q{number}\tp{number}\t1")
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for split, rows in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
