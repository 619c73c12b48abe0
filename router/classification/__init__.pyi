from .classifier import Classification as Classification
from .classifier import Classifier as Classifier
from .classifier import Explanation as Explanation
from .evaluation import LabeledPrompt as LabeledPrompt
from .evaluation import Scores as Scores
from .evaluation import evaluate_classification as evaluate_classification
from .evaluation import read_labeled as read_labeled
from .process import ClassifierProcess as ClassifierProcess
