"""No golden file is forgotten: each is read by a test or stands in pending.txt, never both."""


def test_every_file_is_read_or_pending(accounts):
    there, claimed, waiting = accounts
    forgotten = sorted(there - claimed - set(waiting))
    assert not forgotten, f"neither read by a test nor in tests/parity/pending.txt: {forgotten}"


def test_no_pending_file_is_read(accounts):
    _, claimed, waiting = accounts
    done = sorted(claimed & set(waiting))
    assert not done, (
        f"read by a test, so no longer pending; take them out of tests/parity/pending.txt: {done}"
    )


def test_something_is_read(accounts):
    there, claimed, _ = accounts
    assert claimed & there


def test_pending_is_a_sorted_list_without_repeats(accounts):
    waiting = accounts[2]
    assert waiting == sorted(set(waiting))
