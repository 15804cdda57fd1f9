"""Built-in domains: real text in each, listed the same way each time, clear errors where one is missing."""

import json
import sys

import pytest

from dsv3lib.errors import DataError
from dsv3lib.training.text import domains as module
from dsv3lib.training.text.domains import BUILTIN_DOMAINS, DEFAULT_WEIGHTS, LANGUAGE_PACKS, builtin_domains


@pytest.fixture(scope="module")
def built():
    return {domain.name: domain for domain in builtin_domains()}


def test_all_seven_are_there_in_order(built):
    assert tuple(built) == BUILTIN_DOMAINS == tuple(DEFAULT_WEIGHTS)
    assert sum(DEFAULT_WEIGHTS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in BUILTIN_DOMAINS if name != "arithmetic"])
def test_documents_have_unique_names_and_the_bytes_they_claim(built, name):
    domain = built[name]
    documents = [domain.read(index) for index in range(0, domain.count, 7)]
    assert all(document.text.strip() and document.domain == name for document in documents)
    names = [domain.document_name(index) for index in range(domain.count)]
    assert len(set(names)) == domain.count >= 10
    assert [document.name for document in documents] == names[::7]
    if domain.count < 200:  # the others would only be slower
        sizes = sum(len(domain.read(index).text.encode()) for index in range(domain.count))
        assert sizes == domain.size_bytes


def test_each_domain_is_the_text_it_says(built):
    def texts(name):
        return "\n".join(built[name].read(index).text for index in range(min(built[name].count, 120)))

    assert "def " in texts("code") and "import " in texts("code")
    assert 'The "if" statement' in texts("docs")
    han = sum("\u4e00" <= c <= "\u9fff" for c in texts("chinese"))
    assert han > len(texts("chinese")) / 3
    for name, letters, words in (
        ("german", "äöüß", "und"),
        ("french", "éèàç", "les"),
        ("spanish", "áéíñ", "los"),
    ):
        assert any(letter in texts(name) for letter in letters) and f" {words} " in texts(name)


def test_listing_is_stable(built):
    again = {domain.name: domain.fingerprint() for domain in builtin_domains()}
    assert again == {name: domain.fingerprint() for name, domain in built.items()}
    assert len(set(again.values())) == len(again)


def test_no_long_paragraph_stands_twice_in_docs(built):
    domain = built["docs"]
    paragraphs = [p for i in range(domain.count) for p in domain.read(i).text.rstrip("\n").split("\n\n")]
    assert len(paragraphs) > 1000
    assert len(set(paragraphs)) == len(paragraphs)


def test_no_message_stands_twice_in_a_language(built):
    for name in LANGUAGE_PACKS:
        messages = "".join(built[name].read(i).text for i in range(built[name].count))
        assert len(messages.encode()) == built[name].size_bytes
        lists = [built[name].read(i).text for i in range(built[name].count)]
        assert len(set(lists)) == len(lists)


def test_tests_and_tables_of_the_library_are_left_out(built):
    names = [built["code"].document_name(i) for i in range(built["code"].count)]
    assert "json/decoder.py" in names
    assert not [
        name for name in names if {"test", "tests", "site-packages", "pydoc_data"} & set(name.split("/"))
    ]


def test_arithmetic_depends_on_its_seed_only():
    (zero,), (one,) = (builtin_domains(["arithmetic"], seed=seed) for seed in (0, 1))
    assert zero.count is None and zero.read(3) == builtin_domains(["arithmetic"])[0].read(3)
    assert zero.read(3).text != one.read(3).text


@pytest.mark.parametrize("name", LANGUAGE_PACKS)
def test_a_missing_language_pack_names_the_package_and_the_way_without(monkeypatch, name):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    package = f"jupyterlab-language-pack-{LANGUAGE_PACKS[name].replace('_', '-')}"
    with pytest.raises(DataError, match=f"pip install {package}.*without=\\('{name}',\\)"):
        builtin_domains() if name == "chinese" else builtin_domains([name])
    assert [d.name for d in builtin_domains(["arithmetic", name], without=[name])] == ["arithmetic"]


@pytest.mark.parametrize("content", ['{"": {}, "Fi', "[1, 2]"])
def test_a_broken_catalogue_is_named(monkeypatch, tmp_path, content):
    package = tmp_path / "jupyterlab_language_pack_de_DE"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.json").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    with pytest.raises(DataError, match="broken.json is not a readable JSON catalogue"):
        builtin_domains(["german"])


def test_catalogues_are_read_in_their_order_without_english(monkeypatch, tmp_path):
    package = tmp_path / "jupyterlab_language_pack_de_DE"
    package.mkdir()
    (package / "__init__.py").touch()
    catalogue = {
        "": {"language": "de"},
        "Open": ["Öffnen"],
        "menu\x04Kernel": ["Kernel"],
        "Close": "Schließen",
        "%1 file": ["%1 Datei", "%1 Dateien"],
        "Shut": ["Schließen"],
        "Empty": [""],
    }
    (package / "lab.json").write_text(json.dumps(catalogue))
    monkeypatch.syspath_prepend(tmp_path)
    (german,) = builtin_domains(["german"])
    assert german.count == 1
    assert german.read(0).text == "Öffnen\nSchließen\n%1 Datei\n%1 Dateien\n"


def test_python_without_its_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"domain 'code'.*without=\('code',\)"):
        builtin_domains()


def test_unknown_or_no_names_are_refused():
    with pytest.raises(DataError, match="unknown domain 'klingon'.*spanish"):
        builtin_domains(["klingon"])
    with pytest.raises(DataError, match="unknown domain 'klingon'"):
        builtin_domains(without=["klingon"])
    with pytest.raises(DataError, match="no domain is left"):
        builtin_domains(["code"], without=["code"])
