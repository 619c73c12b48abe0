"""Decides the category of a prompt."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.classification.classifier import Classification as Classification
    from router.classification.classifier import Classifier as Classifier
    from router.classification.classifier import Explanation as Explanation
    from router.classification.evaluation import LabeledPrompt as LabeledPrompt
    from router.classification.evaluation import Scores as Scores
    from router.classification.evaluation import evaluate_classification as evaluate_classification
    from router.classification.evaluation import read_labeled as read_labeled
    from router.classification.process import ClassifierProcess as ClassifierProcess
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "classifier": ["Classification", "Classifier", "Explanation"],
            "evaluation": ["LabeledPrompt", "Scores", "evaluate_classification", "read_labeled"],
            "process": ["ClassifierProcess"],
        },
    )
