"""Keys: where they come from, what is refused, rotation without a restart."""

from __future__ import annotations

import logging

import pytest

from genrecall.serving.api_keys import ApiKeyError, ApiKeys

FIRST, SECOND = "a" * 16, "b" * 32


def test_without_a_file_or_the_variable_no_key_is_asked_for(monkeypatch):
    monkeypatch.delenv("GENRECALL_API_KEYS", raising=False)
    keys = ApiKeys()
    assert not keys.required
    assert not keys.accept(b"")


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("GENRECALL_API_KEYS", f" {FIRST}, {SECOND},")
    keys = ApiKeys()
    assert keys.required
    assert [keys.accept(one.encode()) for one in (FIRST, SECOND, FIRST[:-1], FIRST + "a", "")] == [True, True, False, False, False]


def test_a_file_comes_before_the_environment_and_rotates_without_a_restart(monkeypatch, tmp_path):
    monkeypatch.setenv("GENRECALL_API_KEYS", SECOND)
    file = tmp_path / "keys"
    file.write_text(f"# old\n{FIRST}\n")
    keys = ApiKeys(str(file))
    assert (keys.accept(FIRST.encode()), keys.accept(SECOND.encode())) == (True, False)
    file.write_text(f"{FIRST}\n{SECOND}\n")
    keys.refresh()
    assert keys.accept(FIRST.encode())
    assert keys.accept(SECOND.encode())
    file.write_text(SECOND)
    keys.refresh()
    assert (keys.accept(FIRST.encode()), keys.accept(SECOND.encode())) == (False, True)


def test_a_file_that_breaks_later_leaves_the_keys_as_they_were(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys = ApiKeys(str(file))
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        for broken in ("", "short"):
            file.write_text(broken)
            keys.refresh()
            assert keys.accept(FIRST.encode())
        file.unlink()
        keys.refresh()
    finally:
        logger.removeHandler(caplog.handler)
    assert keys.accept(FIRST.encode())
    assert len(caplog.records) == 3
    assert FIRST not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key; put one key a line"),
        ("# nothing\n", "holds no key"),
        (f"{FIRST}\nshort-secret\n", "key number 2: expected at least 16 printable ASCII"),
        ("schlüssel" * 3, "key number 1: expected at least 16 printable ASCII"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_an_error_without_its_keys(tmp_path, content, message):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ApiKeyError, match=message) as caught:
        ApiKeys(str(tmp_path / "keys"))
    assert "short-secret" not in str(caught.value)
    assert FIRST not in str(caught.value)


def test_a_missing_key_file_is_an_error(tmp_path):
    with pytest.raises(ApiKeyError, match=r"cannot be read \(No such file or directory\); give the path"):
        ApiKeys(str(tmp_path / "absent"))
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    with pytest.raises(ApiKeyError, match=r"cannot be read \(not UTF-8 text\)"):
        ApiKeys(str(tmp_path / "bytes"))


def test_admin_keys_are_others_than_api_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("GENRECALL_API_KEYS", FIRST)
    monkeypatch.delenv("GENRECALL_ADMIN_KEYS", raising=False)
    assert not ApiKeys.for_admins().required
    monkeypatch.setenv("GENRECALL_ADMIN_KEYS", f"{SECOND},{'c' * 16}")
    admins = ApiKeys.for_admins()
    assert [admins.accept(one.encode()) for one in (FIRST, SECOND, "c" * 16)] == [False, True, True]
    (tmp_path / "admins").write_text(f"{FIRST}\n")
    admins = ApiKeys.for_admins(str(tmp_path / "admins"))
    assert (admins.accept(FIRST.encode()), admins.accept(SECOND.encode())) == (True, False)
    (tmp_path / "admins").write_text(SECOND)
    admins.refresh()
    assert (admins.accept(FIRST.encode()), admins.accept(SECOND.encode())) == (False, True)
    with pytest.raises(ApiKeyError, match=r"admin_keys_file .*absent.: cannot be read"):
        ApiKeys.for_admins(str(tmp_path / "absent"))
    monkeypatch.setenv("GENRECALL_ADMIN_KEYS", "short")
    with pytest.raises(ApiKeyError, match="GENRECALL_ADMIN_KEYS: key number 1: expected at least 16"):
        ApiKeys.for_admins()
