"""Planted bugs in Ring, Ulysses, Star and APE; what a `Bug` is, and what it is for, stands in `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["METHOD_BUGS"]

METHOD_BUGS = (
    # Keys that go round the hosts, and heads that are swapped for rows.
    Bug(
        name="a ring's later steps masked as if the keys were one's own",
        file="methods/ring.py",
        old="part = self.full(",
        new="part = self.masked(",
        tests="tests/test_exact_methods.py -k 'equal_exact and ring and not zigzag'",
    ),
    Bug(
        name="a ring that takes the keys for those of the host before",
        file="methods/ring.py",
        old="yield source, x",
        new="yield (source - 1) % n, x",
        tests="tests/test_exact_methods.py -k 'equal_exact and ring and not zigzag'",
    ),
    Bug(
        name="zigzag rows that see the later half of an earlier host's keys",
        file="methods/ring.py",
        old="message[:, :, :columns]",
        new="message[:, :, message.shape[2] - columns :]",
        tests="tests/test_exact_methods.py -k 'equal_exact and zigzag'",
    ),
    Bug(
        name="a ring that waits for the next keys before it attends",
        file="methods/ring.py",
        old="        yield source, x",
        new="        coming and coming.wait()\n        yield source, x",
        tests="tests/test_exact_methods.py -k sends_on",
    ),
    Bug(
        name="hosts that share a KV head read another one",
        file="methods/ulysses.py",
        old="read = [head // group for",
        new="read = [head * hosts // q_heads % kv_heads for",
        tests="tests/test_exact_methods.py -k every_query_head",
    ),
    Bug(
        name="heads taken to be read in step wherever their number allows it",
        file="methods/ulysses.py",
        old="self.reads == tuple(head // max(1, group) for head in range(self.q_heads))",
        new="self.q_heads == group * self.kv_heads",
        tests="tests/test_exact_methods.py -k out_of_step",
    ),
    # Anchors and prefixes that are no query's.
    Bug(
        name="a first block that sees its own first tokens as anchor, too",
        file="blocks.py",
        old="sees_anchor=index > 0 or anchor_on_all",
        new="sees_anchor=True",
        tests="tests/test_star_and_ape.py -k star_equals_its_mask",
    ),
    Bug(
        name="chunks at their true positions",
        file="methods/ape.py",
        old="reuse_positions=True",
        new="reuse_positions=False",
        tests="tests/test_methods_laws.py -k positions",
    ),
    Bug(
        name="a shared prefix whose keys nobody keeps",
        file="blocks.py",
        old="kept_anchor=kept if keep_anchor else (),",
        new="kept_anchor=(),",
        tests="tests/test_methods_laws.py -k held_once",
    ),
    Bug(
        name="a shared prefix whose keys every host keeps",
        file="blocks.py",
        old="kept = share if split_cache else",
        new="kept = whole if split_cache else",
        tests="tests/test_methods_laws.py -k held_once",
    ),
    Bug(
        name="the power of the chunks' weight taken on each host",
        file="methods/ape.py",
        old="""merge(out, lse[..., 0])
        other_out, other_lse = merge(other_out, other_lse[..., 0])
        return merge_pair(out, self.scale * self.temperature * lse,""",
        new="""merge(out, self.scale * self.temperature * lse[..., 0])
        other_out, other_lse = merge(other_out, other_lse[..., 0])
        return merge_pair(out, lse,""",
        tests="tests/test_star_and_ape.py -k applies_once",
    ),
    Bug(
        name="a question that is causal over the chunks",
        file="methods/ape.py",
        old="causal=False, scale=plain / self.temperature",
        new="causal=True, scale=plain / self.temperature",
        tests="tests/test_methods_laws.py -k 'question and ape'",
    ),
    Bug(
        name="each step of a ring counted as long as the first",
        file="methods/ring.py",
        old="sent = sum(plan.host((rank - step) % plan.hosts).block_rows",
        new="sent = sum(plan.host(rank).block_rows",
        tests="tests/test_method_costs.py -k 'counted and ring'",
    ),
    Bug(
        name="a column that a tile covers is gathered as well",
        file="kernels/vertical_slash.py",
        old="mask=inside, other=1) == 0",
        new="mask=inside, other=1) >= 0",
        tests="tests/test_vertical_slash_kernel.py -k by_name",
    ),
    Bug(
        name="every diagonal's weight goes to its neighbour",
        file="attend/patterns.py",
        old="rows + tokens + 1, 1), 1)",
        new="rows + tokens + 1, 1), 0)",
        tests="tests/test_sparse_index.py -k column_and_diagonal",
    ),
    Bug(
        name="tiles that leave a column out between them",
        file="attend/sparse_index.py",
        old="jump = following[..., (place + TILE).clamp(max=last)]",
        new="jump = following[..., (place + TILE + 1).clamp(max=last)]",
        tests="tests/test_sparse_index.py -k greedily",
    ),
    Bug(
        name="a host without rows attends at another scale than its model",
        file="session.py",
        old="scales.get(layer)",
        new="None",
        tests="tests/test_methods_hf.py -k own_scale",
    ),
)
