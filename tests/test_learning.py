"""Does it learn? Bounds were set in advance from a prototype's figures, below the worst that it had seen."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from client.store import Store, open_store
from client.tasks import SPLITS, describer, training_rows
from client.training import LocalWork, finetune, predict, pretrain, read_signals
from shared_model.model import build_model
from shared_model.study import Pretrain, Study
from simulation.consortium import Hospital, make_hospital
from simulation.hospitals import HospitalSpec

CPU = torch.device("cpu")
LABELS = 500


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    hospital = Hospital(HospitalSpec(name="north", patients=1000), tmp_path_factory.mktemp("learning"))
    make_hospital(hospital, seed=0, split="44/1/55")
    torch.set_num_threads(1)
    return open_store(hospital.site_dir)


def embed(encoder: nn.Module, store: Store, rows: np.ndarray) -> np.ndarray:
    encoder.eval()
    with torch.inference_mode():
        parts = [encoder(read_signals(store, chunk, CPU)[0]) for chunk in np.array_split(rows, len(rows) // 128 + 1)]
    return torch.cat(parts).numpy()


def probe_auroc(encoder: nn.Module, store: Store) -> float:
    """AUROC on the test split of a logistic regression on frozen embeddings of 500 labelled training ECGs."""
    elevated = store.index.labels["mpcwp_mmhg"] > 18
    train = store.index.row[store.index.split == SPLITS["train"]][:LABELS]
    test = store.index.row[store.index.split == SPLITS["test"]]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    probe.fit(embed(encoder, store, train), elevated[train])
    return float(roc_auc_score(elevated[test], probe.decision_function(embed(encoder, store, test))))


@pytest.mark.long
def test_pretraining_without_labels_helps_a_frozen_probe(store: Store) -> None:
    """Median-beat SSL-DML lifts a linear probe at 500 labels by at least 0.03 over the same encoder untrained."""
    study = Study(name="probe", seed=0, pretrain=Pretrain(rounds=1, local_epochs=20, batch_size=128))
    model = build_model(study)
    untrained = probe_auroc(model["encoder"], store)
    rows = training_rows(store.index, study, "pretrain")
    describe = describer(store, study, store.site_dir)
    work = LocalWork(study.pretrain, rows, learning_rate=2e-3, seed=0)
    outcome = pretrain(study, model, store, work, CPU, describe)
    assert outcome.diagnostics["violating_share"] < 0.9
    assert probe_auroc(model["encoder"], store) - untrained >= 0.03


@pytest.mark.long
def test_supervised_learning_reads_the_pressure(store: Store) -> None:
    """About 900 labelled ECGs of 440 patients: the prototype reached .748 with 300 patients and .814 with 1,000."""
    study = Study(name="supervised", seed=0)
    model = build_model(study)
    rows = training_rows(store.index, study, "finetune")
    for number in range(1, study.finetune.rounds + 1):
        rate = study.finetune.learning_rate_at(number)
        finetune(study, model, store, LocalWork(study.finetune, rows, rate, seed=number), CPU)
    test = store.index.row[store.index.split == SPLITS["test"]]
    elevated = store.index.labels["mpcwp_mmhg"][test] > 18
    assert roc_auc_score(elevated, predict(study, model, store, test, CPU)) >= 0.72
