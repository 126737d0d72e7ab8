"""Rerank what a keyword search found: ``python docs/examples/rerank_search_results.py``.

A keyword search (BM25) ranks passages by the words that they share with the query. MixEncoder then ranks them by
meaning. Runs offline, with the bundled model.
"""

import math
import re
from collections import Counter

from mixencoder import MixEncoder

QUERY = "what is the best way to store bread"
PASSAGES = [
    "Keep a loaf in a linen bag or a bread box at room temperature; it stays soft for days and does not sweat.",
    "The store on the corner is the best in town, and it is on the way to the station.",
    "Cut off only what you eat and leave the crust on: it is what holds the moisture inside.",
    "What is the way to the museum? The best is to walk along the river.",
    "Freeze slices on the day of baking; toasted from frozen they taste as if they were fresh.",
    "The best bread I ever had was from a bakery that is now a shoe store.",
    "A cold fridge dries out a loaf quicker than a cupboard, because the starch sets again.",
    "What is a key-value store? It is a way to look up data by a name.",
    "Never wrap a warm loaf in plastic: it sweats, and mould follows within days.",
    "Bread rises best when the dough is warm; what slows it is a draught.",
]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def keyword_search(query: str, passages: list[str]) -> list[str]:
    """Return the passages, best first by BM25: shared words count, rare words more."""
    texts = [Counter(words(passage)) for passage in passages]
    average = sum(text.total() for text in texts) / len(texts)

    def score(text: Counter) -> float:
        found = 0.0
        for word in set(words(query)):
            holders = sum(word in other for other in texts)
            rarity = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            found += rarity * text[word] * 2.2 / (text[word] + 1.2 * (0.25 + 0.75 * text.total() / average))
        return found

    order = sorted(range(len(passages)), key=lambda position: -score(texts[position]))
    return [passages[position] for position in order]


def main() -> None:
    """Search, rerank, and print both ranks of every passage."""
    found = keyword_search(QUERY, PASSAGES)
    model = MixEncoder.from_pretrained()
    # for many queries, encode the passages once: model.index(PASSAGES, path=...), rank(query, index, ids=found_ids)
    ranking = model.rank(QUERY, found, return_documents=True)
    print(f"“{QUERY}”\n\n now  was  score")
    for rank, entry in enumerate(ranking, start=1):
        print(f"{rank:4} {entry['corpus_id'] + 1:4} {entry['score']:6.2f}  {entry['text']}")


if __name__ == "__main__":
    main()
