"""The demo's model, trained on the spot, with its test data: what `compare` takes."""

from __future__ import annotations

import torch

from splitquant_plugins.backends import run_of
from splitquant_plugins.demo.corpus import LABELS, make_corpus
from splitquant_plugins.demo.training import bert_tiny, train
from splitquant_plugins.demo.vocabulary import Vocabulary
from splitquant_plugins.evaluation.compare import Subject
from splitquant_plugins.evaluation.metrics import logits_of, tokenize
from splitquant_plugins.evaluation.texts import LabelledTexts

MAX_LENGTH = 64
MODEL_NAME, DATA_NAME = "BERT-Tiny trained by the demo", "generated notes to a hotel"


def train_subject(seed: int, *, train_rows: int, test_rows: int, steps: int, progress: bool = False) -> Subject:
    """Generate the corpus, train a BERT-Tiny on its training rows, and run it over its test rows.

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
    return Subject(MODEL_NAME, model, data, batches, logits_of(run_of(model), batches))
