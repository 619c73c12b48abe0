"""Decides the category of a prompt."""

from typing import TYPE_CHECKING

from router.lazy import lazy_names

if TYPE_CHECKING:
    from router.classification.classifier import Classification as Classification
    from router.classification.classifier import Classifier as Classifier
    from router.classification.classifier import Explanation as Explanation
    from router.classification.process import ClassifierProcess as ClassifierProcess
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "classifier": "Classification Classifier Explanation",
            "process": "ClassifierProcess",
        },
    )
