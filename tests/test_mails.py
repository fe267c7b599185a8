"""The mails: what is read of one, which are near-duplicates, and how they are divided."""

import base64
import itertools
import json
import quopri
import random
import tarfile

import pytest

from examples.data import build_mails as mails


def mail(content, body, *headers):
    lines = ["From: a@example.com", f"Content-Type: {content}", *headers, "", body]
    return "\n".join(lines).encode()


# --- what is read of a mail -----------------------------------------------------------------


def test_only_the_body_is_read():
    raw = b"From x@y.z Thu Aug 22\nSubject: Win\nX-Spam-Flag: YES\n\nHello  there,\nyou.\n"
    assert mails.body(raw) == "Hello there, you."


@pytest.mark.parametrize("coding", ["base64", "quoted-printable"])
def test_encoded_bodies_are_decoded_in_their_charset(coding):
    data = "Grüße, Ærø: 100 €".encode("iso-8859-15", "replace")
    coded = base64.b64encode(data) if coding == "base64" else quopri.encodestring(data)
    head = f"Content-Transfer-Encoding: {coding}"
    raw = mail("text/plain; charset=iso-8859-15", coded.decode("ascii"), head)
    assert mails.body(raw) == "Grüße, Ærø: 100 €"


@pytest.mark.parametrize("charset", ["no-such-charset", "rot13", "us-ascii", "utf-8", "u\0tf"])
def test_a_charset_that_is_wrong_or_unknown_loses_no_mail(charset):
    raw = mail(f"text/plain; charset={charset}", "X").replace(b"X", "naïve".encode("latin-1"))
    assert mails.body(raw) == "naïve"


def test_a_page_becomes_its_text():
    page = """<html><head><title>T</title><style>b {x}</style></head><body bgcolor=red>
    <!-- hidden --> Vi<b></b>agra<br>now &amp; here<table><tr><td>one<td>two</table></body>"""
    assert mails.body(mail("text/html", page)) == "Viagra now & here one two"


def test_a_page_sent_as_plain_text_is_read_as_a_page_and_a_quoted_tag_is_not():
    page = "<HTML><BODY>Buy<BR>this</BODY></HTML>"
    assert mails.body(mail("text/plain", page)) == "Buy this"
    assert mails.body(mail("text/plain", "Use <br> or <p>.")) == "Use <br> or <p>."


def multipart(kind, *parts):
    inner = "".join(f"--B\nContent-Type: {content}\n\n{body}\n" for content, body in parts)
    return mail(f'multipart/{kind}; boundary="B"', f"{inner}--B--\n")


def test_of_alternatives_the_plain_text_is_read_unless_it_is_empty():
    page = ("text/html", "<p>page</p>")
    assert mails.body(multipart("alternative", page, ("text/plain", "plain"))) == "plain"
    assert mails.body(multipart("alternative", ("text/plain", " "), page)) == "page"


def test_texts_are_joined_and_attachments_left_out():
    parts = [("text/plain", "one"), ("image/png", "AAAA"), ("text/html", "<i>two</i>")]
    attached = ("text/plain\nContent-Disposition: attachment", "three")
    forwarded = ("message/rfc822", "Subject: not read\n\nfour")
    assert mails.body(multipart("mixed", *parts, attached, forwarded)) == "one two four"


def test_a_multipart_whose_header_was_lost_is_still_read_as_one():
    raw = b"Subject: x\n\nA MIME message\n--B\nContent-Type: text/html\n\n<b>Hi</b> you\n--B--\n"
    assert mails.body(raw) == "Hi you"


def test_addresses_and_telephone_numbers_are_masked_and_dates_are_not():
    text = "Ann <ann.b+c@mail.example.co.uk> or joe at home dot com, zzzz@localhost"
    masked = "Ann <name@example.org> or name@example.org, name@example.org"
    assert mails.mask(text) == masked
    for number in ("1-800-555-0199", "(020) 7946 0018", "+49 30 1234567", "5550199"):
        assert mails.mask(f"Call {number} now") == "Call 000-0000 now"
    kept = "On 2002-08-22 at 12:30, for $1,500 and 24 hours"
    assert mails.mask(kept) == kept


def test_the_package_is_read_from_a_file_and_from_a_folder_alike(tmp_path):
    files = {
        "data/spam-1/2.b.txt": "Subject: s\n\nbuy this",
        "data/easy-ham-1/1.a.txt": "Subject: h\n\nsee you",
        "data/easy-ham-1/1.a.json": "{}",
        "docs/notes.txt": "no mail",
    }
    for name, text in files.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    packed = tmp_path / "mails.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    expected = [{"text": "see you", "label": 0}, {"text": "buy this", "label": 1}]
    for package in (packed, tmp_path / "package"):
        assert [{**row, "group": 0} for row in mails.build(package)] == [
            {**row, "group": 0} for row in expected
        ]


# --- near-duplicates --------------------------------------------------------------------------


def random_sets(seed):
    chance = random.Random(seed)
    sets = [set(chance.sample("abcdefghijkl", chance.randint(0, 9))) for _ in range(60)]
    return [*sets, set(), set(sets[3])]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_pairs_found_are_those_of_comparing_all_with_all(seed, threshold):
    sets = random_sets(seed)
    found = list(mails.similar_pairs(sets, threshold))
    pairs = itertools.combinations(range(len(sets)), 2)
    alike = {
        (i, j)
        for i, j in pairs
        if sets[i] | sets[j] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    }
    assert {tuple(sorted(pair)) for pair in found} == alike
    assert len(found) == len(alike)


def words(chance, count):
    return " ".join(
        chance.choices(
            [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9)], k=count
        )
    )


def test_copies_share_a_group_whatever_their_case_numbers_and_tracking_words():
    first = "Dear friend, you have won 500 dollars in our lottery, call us today and be rich."
    copies = [first, first.upper().replace("500", "731"), f"{first} qzx"]
    other = "The kernel does not build with this patch, could you have a look at the log?"
    assert mails.group([other, *copies]) == [0, 1, 1, 1]


def test_groups_are_joined_through_a_common_member():
    chance = random.Random(0)
    a, b, c = (words(chance, 30) for _ in range(3))
    texts = [f"{a} {b}", f"{b} {c}", f"{a} {b} {c}"]
    assert mails.jaccard(*map(mails.shingles, texts[:2])) < mails.THRESHOLD
    assert mails.group(texts) == [0, 0, 0]


def test_mails_that_begin_alike_share_a_group_since_a_model_reads_the_beginning():
    chance = random.Random(1)
    head = words(chance, 150)
    texts = [f"{head} {words(chance, 600)}" for _ in range(2)]
    assert mails.jaccard(*map(mails.shingles, texts)) < mails.THRESHOLD
    assert mails.group(texts) == [0, 0]


# --- splits -----------------------------------------------------------------------------------


def corpus(seed, count=300):
    """Returns texts of which many are altered copies, and labels that copies share."""
    chance = random.Random(seed)
    texts, labels = [], []
    while len(texts) < count:
        text, label = words(chance, chance.randint(3, 60)), int(chance.random() < 0.3)
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            texts.append(f"{text} {words(chance, 1)}")
            labels.append(label)
    return texts, labels


@pytest.mark.parametrize("seed", range(3))
def test_no_near_duplicates_stand_on_two_sides_of_a_split(seed):
    texts, labels = corpus(seed)
    parts = mails.split(labels, mails.group(texts), (0.6, 0.1, 0.3), seed)
    assert sorted(i for part in parts for i in part) == list(range(len(texts)))
    for one, other in itertools.combinations(parts, 2):
        closest = 0.0
        for cut in (None, mails.HEAD):
            sets = [[mails.shingles(texts[i][:cut]) for i in part] for part in (one, other)]
            closest = max(closest, *itertools.starmap(mails.jaccard, itertools.product(*sets)))
        assert closest < mails.THRESHOLD
        assert mails.closest_across(*([texts[i] for i in part] for part in (one, other))) == closest


@pytest.mark.parametrize("seed", range(3))
def test_every_part_gets_its_share_of_each_label(seed):
    texts, labels = corpus(seed)
    shares = (0.6, 0.1, 0.3)
    parts = mails.split(labels, mails.group(texts), shares, seed)
    for part, share in zip(parts, shares, strict=True):
        for label in (0, 1):
            wanted = share * labels.count(label)
            # whole groups are dealt, the largest of which hold 8
            assert abs(sum(labels[i] == label for i in part) - wanted) < 8


def test_a_split_is_the_same_for_the_same_seed_and_another_for_another():
    texts, labels = corpus(0)
    groups = mails.group(texts)
    one, again, other = (mails.split(labels, groups, (0.5, 0.5), seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


# --- what lies in the repository --------------------------------------------------------------


def test_the_subset_takes_one_mail_of_a_group_and_no_coarse_one():
    chance = random.Random(0)
    texts = [f"{'porn ' if i % 10 == 0 else ''}{words(chance, 250)}" for i in range(640)]
    rows = [{"text": text, "label": i % 2, "group": i} for i, text in enumerate(texts)]
    rows += [{**row, "text": f"{row['text']} more"} for row in rows[:40]]
    chosen = mails.subset(rows)
    assert [sum(row["label"] == label for row in chosen) for label in (0, 1)] == [mails.EACH] * 2
    assert len({row["text"] for row in chosen}) == len(chosen)
    assert not [row for row in chosen if "porn" in row["text"]]
    assert {len(row["text"]) for row in chosen} <= {mails.LETTERS - i for i in range(4)}
    whole = {text[:40]: text for text in texts}
    assert all(whole[row["text"][:40]].startswith(f"{row['text']} ") for row in chosen)
    assert chosen == mails.subset(rows)


@pytest.fixture(scope="module")
def subset():
    return [json.loads(line) for line in mails.SUBSET.read_text(encoding="utf-8").splitlines()]


def test_the_mails_in_the_repository_are_small_balanced_and_of_different_groups(subset):
    assert mails.SUBSET.stat().st_size < 400_000
    assert [sum(row["label"] == label for row in subset) for label in (0, 1)] == [mails.EACH] * 2
    assert all(set(row) == {"text", "label"} for row in subset)
    assert mails.group([row["text"] for row in subset]) == list(range(len(subset)))


def test_the_mails_in_the_repository_hold_no_address_and_no_number(subset):
    assert not [row["text"] for row in subset if mails.mask(row["text"]) != row["text"]]
