"""The full built-in text: where it comes from, that nothing comes twice, and that a machine without it is served."""

import pytest

from dsv3lib.training.text import full_text
from dsv3lib.training.text.docstrings import docstrings, documented_files
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.duplicates import message_key
from dsv3lib.training.text.full_text import full_domains, redundancy
from dsv3lib.training.text.order import Split


@pytest.fixture(scope="module")
def german():
    (domain,) = builtin_domains(["german"], text="full")
    return domain


def test_a_language_holds_all_that_the_small_text_holds_and_no_message_twice(german):
    (small,) = builtin_domains(["german"])
    own = {german.document_name(i) for i in range(german.count)}
    kept = [f"jupyterlab/{small.document_name(i)}" in own for i in range(small.count)]
    assert sum(kept) >= 0.9 * len(kept)
    beyond = [
        german.read(i).text for i in range(german.count) if not german.document_name(i).startswith("jup")
    ]
    lines = [line for text in beyond for line in text.split("\n")]
    keys = [
        key for key in map(message_key, lines) if len(key) > 60
    ]  # a long line is a message, not a part of one
    assert beyond and len(set(keys)) >= 0.97 * len(keys)
    assert german.sources["babel"] > 20_000


def test_the_account_of_redundancy_adds_up_and_the_fingerprint_is_stable(german):
    account = redundancy(german)
    assert account.bytes - account.near_bytes - account.repeated_bytes == german.size_bytes
    assert sum(german.sources.values()) == german.size_bytes
    assert full_domains(["german"])[0].fingerprint() == german.fingerprint()
    assert redundancy(builtin_domains(["arithmetic"], text="full")[0]) is None


def test_a_machine_without_system_catalogues_and_babel_still_has_the_language(monkeypatch, german):
    monkeypatch.setattr(full_text, "system_catalogues", lambda locales: [])
    monkeypatch.setattr(full_text, "babel_names", lambda locale: {})
    (domain,) = full_domains(["german"])
    assert list(domain.sources) == ["jupyterlab"]
    assert 0 < domain.size_bytes < german.size_bytes


def test_a_damaged_system_catalogue_is_passed_over_and_said(monkeypatch, tmp_path):
    (tmp_path / "broken.mo").write_bytes(b"no catalogue")
    monkeypatch.setattr(full_text, "system_catalogues", lambda locales: [tmp_path / "broken.mo"])
    with pytest.warns(UserWarning, match=r"passed over.*broken\.mo"):
        (domain,) = full_domains(["spanish"])
    assert "babel" in domain.sources and "system" not in domain.sources


def test_documentation_comes_from_several_packages_and_its_validation_is_large(monkeypatch):
    monkeypatch.setattr(full_text, "PACKAGES", ("numpy", "no_such_package"))
    (docs,) = full_domains(["docs"])
    assert set(docs.sources) == {"python", "numpy"} and docs.sources["numpy"] > docs.sources["python"]
    assert redundancy(docs).repeated_bytes > 0
    split = Split(docs)
    size = sum(len(docs.read(i).text) for i in range(docs.count) if split.part(i) == "validation")
    assert size > 80_000  # 20,000 tokens of at most four bytes


def test_docstrings_are_found_by_their_quotes():
    source = 'def f():\n    r"""Says much.\n\n        Deep.\n    ' + "x y " * 40 + '"""\n\nshort = """no"""\n'
    (found,) = docstrings(source)
    assert found.startswith("Says much.\n\n    Deep.\nx y")
    assert documented_files("no_such_package") == {} and "numpy/linalg/_linalg.py" in documented_files(
        "numpy"
    )
    assert not any("/tests/" in name for name in documented_files("numpy"))
