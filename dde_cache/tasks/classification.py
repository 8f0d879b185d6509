"""One label a text, accuracy by kind of question: easy-VQA, NLVR v1, shapes, and anything alike."""

from dde_cache.tasks.contract import SingleLabel


class Classification(SingleLabel):
    """The teacher's answers are the classes; one or two pictures a sample."""
