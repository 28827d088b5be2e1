from smelt.inference.block_pool import BlockPool


def test_blocks_are_taken_until_there_are_none() -> None:
    pool = BlockPool(3)
    assert {pool.take() for _ in range(3)} == {0, 1, 2}
    assert pool.take() is None
    pool.release(1)
    assert (pool.num_idle, pool.take()) == (1, 1)


def test_a_shared_block_is_idle_when_its_last_user_leaves() -> None:
    pool = BlockPool(1)
    block = pool.take()
    assert block is not None
    pool.share(block)
    pool.release(block)
    assert not pool.is_idle(block)
    pool.release(block)
    assert pool.is_idle(block)


def test_content_is_found_until_its_block_is_needed() -> None:
    pool = BlockPool(2)
    block = pool.take()
    assert block is not None
    pool.name(block, b"a")
    pool.name(block, b"and more")
    pool.release(block)
    assert pool.find(b"a") == pool.find(b"and more") == block
    assert pool.take() != block  # the other has nothing to lose
    assert pool.take() == block
    assert pool.find(b"a") is pool.find(b"and more") is None


def test_what_was_used_last_is_forgotten_last() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        assert block is not None
        pool.name(block, key)
    for block in blocks:
        assert block is not None
        pool.release(block)
    pool.touch(blocks[0] or 0)
    pool.share(blocks[1] or 0)
    pool.release(blocks[1] or 0)
    assert [pool.take() for _ in range(3)] == [blocks[2], blocks[0], blocks[1]]


def test_the_first_block_of_a_name_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find(b"a") == first
    pool.release(second)
    assert pool.take() == second
    assert pool.find(b"a") == first
