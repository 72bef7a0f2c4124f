"""The demo's model, trained on the spot, with its test data: what `compare` takes."""

from __future__ import annotations

import torch

from splitquant_plugins.demo.corpus import LABELS, make_corpus
from splitquant_plugins.demo.training import bert_tiny, train
from splitquant_plugins.demo.vocabulary import Vocabulary
from splitquant_plugins.evaluation.metrics import tokenize
from splitquant_plugins.evaluation.subject import Subject, make_subject
from splitquant_plugins.evaluation.tasks.text_classification import TEXT_CLASSIFICATION, labelled_batches
from splitquant_plugins.evaluation.texts import LabelledTexts

MAX_LENGTH = 64
MODEL_NAME, DATA_NAME = "BERT-Tiny trained by the demo", "generated notes to a hotel"


def train_subject(
    seed: int, *, train_rows: int, test_rows: int, steps: int, progress: bool = False
) -> tuple[Subject, LabelledTexts]:
    """Generate the corpus, train a BERT-Tiny on its training rows, and run it over its test rows, which are returned.

    Everything follows from `seed` (for a given machine, number of threads and torch); torch's global random
    state is left as it was.
    """
    rows = make_corpus(train_rows + test_rows, seed)
    training, test = rows[:train_rows], rows[train_rows:]
    vocabulary = Vocabulary(row.text for row in training)
    inputs = vocabulary([row.text for row in training])
    labels = torch.tensor([row.label for row in training])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = bert_tiny(len(vocabulary), len(LABELS), positions=MAX_LENGTH)
        model = train(model, inputs, labels, steps=steps, seed=seed, progress=progress)
    data = LabelledTexts(DATA_NAME, [row.text for row in test], [row.label for row in test])
    batches = tokenize(vocabulary, data.texts, MAX_LENGTH)
    return make_subject(MODEL_NAME, TEXT_CLASSIFICATION, model, labelled_batches(data, batches)), data
