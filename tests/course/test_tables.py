"""Tables: what differs between machines and runs is marked, line by line."""


def test_every_line_of_a_varying_table_bears_the_mark(monkeypatch) -> None:
    from dsv3lib.course import card, tables

    shown = []
    monkeypatch.setattr(card, "show", lambda html, text: shown.append(text))
    tables.table(["given", "written"], [("a", "two\nlines\x0band\u2028more")], varies=True)
    assert all(line.startswith("measured |") for line in shown[0].splitlines()) and len(shown[0].splitlines()) >= 4
