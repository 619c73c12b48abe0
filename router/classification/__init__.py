"""Decides the category of a prompt."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.classification.classifier import Classification as Classification
    from router.classification.classifier import Classifier as Classifier
    from router.classification.classifier import Explanation as Explanation
    from router.classification.process import ClassifierProcess as ClassifierProcess
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "classifier": ["Classification", "Classifier", "Explanation"],
            "process": ["ClassifierProcess"],
        },
    )
