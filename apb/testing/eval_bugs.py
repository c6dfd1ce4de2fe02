"""Planted bugs in training heads, answering and evaluating; what a `Bug` is stands in `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["EVAL_BUGS"]

EVAL_BUGS = (
    # What retaining heads learn.
    Bug(
        name="labels that are the mean over answer tokens and heads",
        file="train/labels.py",
        old="torch.bmm(rows, keys).amax(dim=1)",
        new="torch.bmm(rows, keys).mean(dim=1)",
        tests="tests/test_train_*.py -k labels_and_features",
    ),
    Bug(
        name="scores smoothed from head to head",
        file="train/heads.py",
        old="scores.diff(dim=-1)",
        new="scores.diff(dim=1)",
        tests="tests/test_train_*.py -k loss_is_the_formula",
    ),
    # What is asked, and where.
    Bug(
        name="depths counted in sentences",
        file="evals/haystack.py",
        old="_nearest(boundaries, depth * space)",
        new="round(depth * (len(boundaries) - 1))",
        tests="tests/test_eval_haystack.py -k boundary_nearest",
    ),
    Bug(
        name="a fraction of a host's rows where it has two blocks",
        file="evals/evaluate.py",
        old='hosts * (2 if layout == "zigzag" else 1)',
        new="hosts",
        tests="tests/test_method_names.py -k fraction",
    ),
    # What is answered.
    Bug(
        name="an answer's tokens judged by a model that has read them",
        file="evals/ask.py",
        old="given = targets[:, :-1]",
        new="given = targets[:, 1:]",
        tests="tests/test_eval_ask.py -k 'likelihoods and flash'",
    ),
    Bug(
        name="a token of the last question stays",
        file="session.py",
        old="held.shape[2] - (self.tokens - tokens)",
        new="held.shape[2] - (self.tokens - tokens - 1)",
        tests="tests/test_conversation.py -k 'further_question_answers and flash'",
    ),
    Bug(
        name="caches joined in the order of ranks, and the wrong keys forgotten",
        file="session.py",
        old="ordered = [part for part in sessions if part.host.rank != owner] + [sessions[owner]]",
        new="ordered = list(sessions)",
        tests="tests/test_eval_ask.py -k joined",
    ),
    Bug(
        name="a nucleus without the token that completes it",
        file="sampling.py",
        old="mass.cumsum(dim=-1) - mass\n",
        new="mass.cumsum(dim=-1)\n",
        tests="tests/test_sampling.py -k 'draws_follow and settings3'",
    ),
    Bug(
        name="a character shown before its last byte",
        file="detokenizer.py",
        old="if self._text and not self._text.endswith(_PART):",
        new="if self._text:",
        tests="tests/test_stream.py -k last_byte",
    ),
    # What is counted.
    Bug(
        name="one value of several is enough",
        file="evals/scoring.py",
        old="sum(reference.lower() in text for reference in references) / len(references)",
        new="float(any(reference.lower() in text for reference in references))",
        tests="tests/test_eval_scoring.py -k benchmark_scores",
    ),
    Bug(
        name="answers paired as they come",
        file="evals/statistics.py",
        old="""for question, record in first.items():
        difference = getattr(record, value) - getattr(second[question], value)""",
        new="""for (question, record), other in zip(first.items(), second.values(), strict=True):
        difference = getattr(record, value) - getattr(other, value)""",
        tests="tests/test_eval_statistics.py -k whatever_the_order",
    ),
)
