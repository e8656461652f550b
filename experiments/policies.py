"""Compare exit policies that learn when to leave with thresholds on the confidence, on logits of a trained network.

    python -m experiments.policies --logits logits.pt --images 1000 5000

Each draw fits every policy to some of the images, at nine budgets, and measures it on the rest. Accuracies at equal
cost are interpolated between the budgets. A draw takes seconds, with EENet minutes; finished ones are kept in a file
(`--results`), so that a stopped comparison continues. `logits.pt` is a file of `torch.save` with ``logits`` [K, N, C],
``targets`` [N] and ``costs``, the cumulative multiply-adds of the exits [K].
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.adaptive.evaluate import CachedLogits
from timm_mlcsd.adaptive.exit_rates import _leaving
from timm_mlcsd.adaptive.methods import FIT_METHODS
from timm_mlcsd.adaptive.policy import score_of
from timm_mlcsd.adaptive.samples import FitSamples, Outcomes
from timm_mlcsd.adaptive.scaling import fit_temperatures
from timm_mlcsd.adaptive.search import Goal
from timm_mlcsd.cli.arguments import ScriptParser, positive_int
from timm_mlcsd.errors import UserError, run_script
from timm_mlcsd.report import format_table

BUDGETS = np.linspace(0.25, 0.9, 9)
REPORTED = (0.4, 0.6, 0.8)
FOLDS = 2


class Data(NamedTuple):
    """Images with the answers of all exits.

    Attributes:
        probs: Calibrated probabilities, [K, N, C].
        targets: Labels, [N].
    """

    probs: np.ndarray
    targets: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """Predicted classes, [K, N]."""
        return self.probs.argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the answers are right, [K, N]."""
        return self.answers == self.targets

    def rows(self, index: np.ndarray) -> 'Data':
        """The images of given rows."""
        return Data(self.probs[:, index], self.targets[index])


class ScoredSamples(FitSamples):
    """Samples whose scores are given, whatever the policy says of them.

    Args:
        scores: Scores of the exits but the last, [K-1, N].
        data: The images.
    """

    def __init__(self, scores: np.ndarray, data: Data):
        k, n = data.correct.shape
        super().__init__(CachedLogits(torch.zeros(k, n, 2), torch.zeros(n, dtype=torch.long)))
        self._given = Outcomes(np.concatenate([scores, np.ones((1, n))]).astype(np.float64), data.correct)

    def outcomes(self, policy: ExitPolicy) -> Outcomes:
        """The given scores; see `FitSamples.outcomes`."""
        return self._given


# A score: a function that learns from images, and gives a function from images to scores [K-1, N].
Score = Callable[[Data, np.ndarray], Callable[[Data], np.ndarray]]


def plain(score: str) -> Score:
    """A score of the package; nothing is learned."""
    return lambda train, costs: lambda data: score_of(torch.from_numpy(data.probs[:-1]).log(), score).numpy()


def features(data: Data, exit_: int, joint: bool) -> np.ndarray:
    """Features of an exit, [N, D]: its confidence, margin and entropy; with `joint` also those of the exits before."""
    columns = []
    for k in range(exit_ + 1) if joint else (exit_,):
        p = data.probs[k].clip(1e-12)
        top = np.sort(p, axis=-1)[:, -2:]
        columns += [np.log(top[:, 1]), np.log(top[:, 1]) - np.log(top[:, 0]), -(p * np.log(p)).sum(-1)]
        if k < exit_:
            columns.append(data.answers[k] == data.answers[exit_])
    return np.stack(columns, axis=-1).astype(np.float64)


def gate(joint: bool, classes: bool = False) -> Score:
    """A logistic regression per exit: the probability that leaving here loses nothing against the last exit.

    Args:
        joint: Whether it sees the exits before.
        classes: Whether every predicted class has an intercept of its own, which makes thresholds per class.
    """

    def inputs(data: Data, k: int) -> np.ndarray:
        values = features(data, k, joint)
        if classes:
            values = np.concatenate([values, np.eye(data.probs.shape[-1])[data.answers[k]]], axis=-1)
        return values

    def learn(train: Data, costs: np.ndarray) -> Callable[[Data], np.ndarray]:
        models = []
        for k in range(len(train.probs) - 1):
            keeps = train.correct[k] | ~train.correct[-1]
            if keeps.all() or not keeps.any():
                models.append(None)
                continue
            scaler = StandardScaler().fit(inputs(train, k))
            models.append(
                (scaler, LogisticRegression(C=0.1, max_iter=300).fit(scaler.transform(inputs(train, k)), keeps))
            )

        def scores(data: Data) -> np.ndarray:
            found = []
            for k, model in enumerate(models):
                if model is None:
                    found.append(data.probs[k].max(-1))
                else:
                    found.append(model[1].predict_proba(model[0].transform(inputs(data, k)))[:, 1])
            return np.stack(found)

        return scores

    return learn


class Scheduler(torch.nn.Module):
    """The scheduler of EENet (Ilhan et al., WACV 2024): scores and shares of the exits, learned for one budget.

    An exit's score is a linear function of its probabilities, its largest one, its entropy and the scores of the exits
    before, clamped to 0..1. A network of one hidden layer per exit sees the same and says how much an image belongs to
    the exit; a softmax over the exits makes shares of it.

    Args:
        num_exits: Number of exits K.
        num_classes: Number of classes C.
    """

    def __init__(self, num_exits: int, num_classes: int):
        super().__init__()
        sizes = [num_classes + 2 + k for k in range(num_exits)]
        self.scores = torch.nn.ModuleList(torch.nn.Linear(size, 1) for size in sizes)
        self.shares = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(size, size // 2), torch.nn.Sigmoid(), torch.nn.Linear(size // 2, 1))
            for size in sizes
        )

    def forward(self, probs: torch.Tensor) -> List[torch.Tensor]:
        """Scores and shares, [N, K] each, of probabilities [K, N, C]."""
        scores: List[torch.Tensor] = []
        shares = []
        for k, p in enumerate(probs):
            entropy = 1 - torch.special.entr(p).sum(-1, keepdim=True) / np.log(p.shape[-1])
            seen = torch.cat([p, p.amax(-1, keepdim=True), entropy, *(s.detach()[:, None] for s in scores)], dim=-1)
            scores.append(self.scores[k](seen)[:, 0].clamp(1e-4, 1 - 1e-4))
            shares.append(self.shares[k](seen)[:, 0].sigmoid())
        return [torch.stack(scores, dim=-1), torch.stack(shares, dim=-1).softmax(dim=-1)]


def fit_scheduler(train: Data, costs: np.ndarray, budget: float, steps: int = 400) -> Scheduler:
    """Train a scheduler: scores to tell right from wrong answers, shares to follow the scores within the budget."""
    torch.manual_seed(0)
    probs, correct = torch.from_numpy(train.probs).float(), torch.from_numpy(train.correct.T).float()
    scheduler = Scheduler(len(probs), probs.shape[-1])
    for layer in scheduler.scores:  # begin as the largest probability
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        layer.weight.data[0, probs.shape[-1]] = 1.0
    optimizer = torch.optim.Adam(scheduler.parameters(), lr=0.01, weight_decay=1e-4)
    price = torch.from_numpy(costs).float()
    for _ in range(steps):
        scores, shares = scheduler(probs)
        weight = shares.detach() / shares.detach().sum(dim=0)
        wanted = scores.detach() ** 2
        wanted = wanted / wanted.sum(dim=-1, keepdim=True)
        loss = (weight * F.binary_cross_entropy(scores, correct, reduction='none')).sum() / len(costs)
        loss = loss + F.kl_div(shares.log(), wanted, reduction='batchmean')
        loss = loss + 10 * ((shares @ price).mean() / budget - 1).abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scheduler


def eenet_scores(train: Data, costs: np.ndarray) -> Callable[[Data], np.ndarray]:
    """The scores of a scheduler for a middle budget."""
    scheduler = fit_scheduler(train, costs, 0.6 * costs[-1])
    return lambda data: _scheduled(scheduler, data)[0][:, :-1].T


@torch.no_grad()
def _scheduled(scheduler: Scheduler, data: Data) -> List[np.ndarray]:
    return [value.double().numpy() for value in scheduler(torch.from_numpy(data.probs).float())]


SCORES: Dict[str, Score] = {
    'confidence': plain('confidence'),
    'margin': plain('margin'),
    'logit margin': plain('logit_margin'),
    'entropy': plain('entropy'),
    'gate per exit': gate(joint=False),
    'gate per exit and class': gate(joint=False, classes=True),
    'joint gate': gate(joint=True),
    "EENet's scores": eenet_scores,
}
POLICIES = (*SCORES, 'EENet')


def curve(score: Score, fit: Data, fresh: Data, costs: np.ndarray, budgets: np.ndarray, method: str) -> np.ndarray:
    """Accuracy in percent on fresh images at given costs.

    Scores for the thresholds are of images that the score was not learned from (two folds).
    """
    halves = np.array_split(np.random.default_rng(0).permutation(len(fit.targets)), FOLDS)
    scores = np.empty((len(costs) - 1, len(fit.targets)))
    for rows in halves:
        others = np.setdiff1d(np.arange(len(fit.targets)), rows)
        scores[:, rows] = score(fit.rows(others), costs)(fit.rows(rows))
    samples = ScoredSamples(scores, fit)
    rest = ScoredSamples(score(fit, costs)(fresh), fresh)
    template = ExitPolicy((0.0,) * (len(costs) - 1))
    policies = [FIT_METHODS[method](samples, costs.tolist(), Goal(budget=b), template) for b in budgets]
    return _at(budgets, [rest.evaluate(policy, costs.tolist()) for policy in policies if policy is not None])


def eenet_curve(fit: Data, fresh: Data, costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The same for EENet as a whole: scores and exit rates of a scheduler per budget."""
    points = []
    for budget in budgets:
        scheduler = fit_scheduler(fit, costs, budget)
        scores, shares = _scheduled(scheduler, fit)
        counts = [int(share * len(scores)) for share in shares.mean(axis=0)[:-1]]
        policy = _leaving(ScoredSamples(scores[:, :-1].T, fit), ExitPolicy((0.0,) * (len(costs) - 1)), counts)
        rest = ScoredSamples(_scheduled(scheduler, fresh)[0][:, :-1].T, fresh)
        points.append(rest.evaluate(policy, costs.tolist()))
    return _at(budgets, points)


def _at(budgets: np.ndarray, points: Sequence[Any]) -> np.ndarray:
    """Accuracy at the reported shares of the largest budget's scale, between points of cost and accuracy."""
    ordered = sorted((point.cost, point.accuracy) for point in points)
    wanted = np.array(REPORTED) * budgets[-1] / BUDGETS[-1]
    return np.interp(wanted, [cost for cost, _ in ordered], [accuracy for _, accuracy in ordered])


def parts_of_draw(stored: Dict[str, torch.Tensor], num_images: int, draw: int) -> List[Data]:
    """Images of one draw to fit policies to, and the others."""
    order = torch.randperm(len(stored['targets']), generator=torch.Generator().manual_seed(draw))
    parts = []
    temperatures = None
    for rows in (order[:num_images], order[num_images:]):
        logits, targets = stored['logits'][:, rows].float(), stored['targets'][rows]
        temperatures = fit_temperatures(logits, targets) if temperatures is None else temperatures
        scaled = logits / torch.tensor(temperatures)[:, None, None]
        parts.append(Data(scaled.softmax(-1).numpy(), targets.numpy()))
    return parts


def one_draw(stored: Dict[str, torch.Tensor], num_images: int, draw: int, policy: str) -> List[float]:
    """Accuracies of a policy at the reported costs, fitted to one draw of images and measured on the others."""
    fit, fresh = parts_of_draw(stored, num_images, draw)
    costs = stored['costs'].double().numpy()
    budgets = BUDGETS * costs[-1]
    if policy == 'EENet':
        return eenet_curve(fit, fresh, costs, budgets).tolist()
    return curve(SCORES[policy], fit, fresh, costs, budgets, 'shrunk').tolist()


class Draws:
    """Results of `one_draw` in a file, so that none is computed twice.

    Args:
        path: Path of the file, a JSON line per draw and policy.
        digest: Digest of the logits.
    """

    def __init__(self, path: Path, digest: str):
        self.path = path
        self.digest = digest
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.known = {(r['images'], r['draw'], r['policy']): r['top1'] for r in lines if r['logits'] == digest}

    def result(self, stored: Dict[str, torch.Tensor], num_images: int, draw: int, policy: str) -> List[float]:
        """The result of `one_draw` for these arguments."""
        key = (num_images, draw, policy)
        if key not in self.known:
            self.known[key] = one_draw(stored, *key)
            record = dict(logits=self.digest, images=num_images, draw=draw, policy=policy, top1=self.known[key])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open('a') as f:
                f.write(json.dumps(record) + '\n')
        return self.known[key]


def compare(found: Dict[str, List[List[float]]]) -> str:
    """Table of accuracies and of leads over the first policy, over draws of the images to fit.

    Args:
        found: Results of `one_draw` for every draw, by policy.
    """
    rows = []
    accuracies = {policy: np.array(results) for policy, results in found.items()}
    first = next(iter(accuracies.values()))
    for policy, values in accuracies.items():
        leads = values - first
        cells: List[Any] = [policy]
        for i in range(len(REPORTED)):
            cells += [float(values[:, i].mean()), float(leads[:, i].mean()), float(leads[:, i].std(ddof=1))]
        rows.append(cells)
    headers = ['Policy']
    for share in REPORTED:
        headers += [f'Top-1 at {share:.0%}', 'Lead', 'Std']
    return format_table(headers, rows)


def main() -> None:
    """Print one table per number of images."""
    parser = ScriptParser(prog='experiments.policies', description=__doc__.splitlines()[0])
    parser.add_argument('--logits', required=True, metavar='FILE', help='file with logits, targets and costs')
    parser.add_argument('--images', type=positive_int, nargs='+', default=[1000, 5000], help='images to fit')
    parser.add_argument(
        '--policies',
        nargs='+',
        choices=POLICIES,
        default=POLICIES,
        metavar='NAME',
        help=f'policies, the first of which the others are compared with: {", ".join(POLICIES)}',
    )
    parser.add_argument(
        '--results',
        type=Path,
        default=Path('output/policies.jsonl'),
        metavar='FILE',
        help='finished draws; others follow',
    )
    parser.add_argument('--draws', type=positive_int, default=20, help='draws of these images')

    def run(args: argparse.Namespace) -> None:
        if args.draws < 2:
            raise UserError(f'--draws {args.draws}: expected at least 2, which tell how much a lead varies.')
        torch.set_num_threads(1)
        stored = torch.load(args.logits, weights_only=True)
        draws = Draws(args.results, hashlib.sha256(Path(args.logits).read_bytes()).hexdigest()[:16])
        for n in args.images:
            found = {p: [draws.result(stored, n, draw, p) for draw in range(args.draws)] for p in args.policies}
            print(f'\n{n} images, {args.draws} draws\n{compare(found)}')

    run_script('experiments.policies', lambda: run(parser.parse_args()))


if __name__ == '__main__':
    main()
