import itertools

import pytest

from pageferry.hypervisor import locks as locks_module
from pageferry.hypervisor.locks import DomainLocks, LockOrderError, LockRank


def in_order(locks):
    return tuple(locks)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(len(LockRank)), repeat=2)))
def test_a_lock_is_taken_only_after_those_before_it(first, second):
    locks = in_order(DomainLocks())
    with locks[first]:
        if second > first:
            with locks[second]:
                assert locks[second].mine
        else:
            with pytest.raises(LockOrderError), locks[second]:
                pytest.fail("taken out of order")
    assert not any(lock.mine for lock in locks)


def test_a_refused_lock_leaves_nothing_held():
    locks = DomainLocks()
    with locks.log_dirty, pytest.raises(LockOrderError), locks.p2m:
        pytest.fail("taken out of order")
    with locks.domain, locks.p2m, locks.paging, locks.log_dirty:
        pass


def test_the_order_binds_two_domains_in_one_thread():
    one, other = DomainLocks(), DomainLocks()
    with one.p2m, pytest.raises(LockOrderError, match="P2M lock taken while holding P2M"), other.p2m:
        pytest.fail("taken twice")


def test_a_lock_of_another_domain_is_not_mine():
    one, other = DomainLocks(), DomainLocks()
    with one.p2m:
        assert one.p2m.mine
        assert not other.p2m.mine


def test_the_order_is_the_one_that_is_written_down():
    assert "  >  ".join(lock.rank.name for lock in DomainLocks()) in locks_module.__doc__
    assert [lock.rank for lock in DomainLocks()] == list(LockRank)
