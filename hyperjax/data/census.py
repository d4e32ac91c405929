"""The two groups of tasks that the MMoE paper makes of Census-Income (KDD).

N rows.
"""

import os
from collections.abc import Sequence

import numpy as np

from hyperjax.data.multitask import SPLITS, TaskData, TaskSplit
from hyperjax.data.tables import Table, TableEncoder, read_table
from hyperjax.routing.tasks import Binary, Task

# fmt: off
COLUMNS = (
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat",
    "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason",
    "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat", "region_prev_res",
    "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg",
    "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother",
    "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year", "income_50k",
)
# fmt: on
MONEY = ("wage_per_hour", "capital_gains", "capital_losses", "stock_dividends")
NUMERIC = ("age", *MONEY, "num_emp", "weeks_worked")
WEIGHT = "instance_weight"
INCOME = {"- 50000.": False, "50000+.": True}
MARRIED = (
    "Married-civilian spouse present",
    "Married-spouse absent",
    "Married-A F spouse present",
    "Separated",
    "Divorced",
    "Widowed",
)
DEGREES = (
    "Associates degree-occup /vocational",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
NO_DEGREE = (
    "Children",
    "Less than 1st grade",
    "1st 2nd 3rd or 4th grade",
    "5th or 6th grade",
    "7th and 8th grade",
    "9th grade",
    "10th grade",
    "11th grade",
    "12th grade no diploma",
    "High school graduate",
    "Some college but no degree",
)
# Each task by its name: its column, and whether a value of it is a yes.
NEVER_MARRIED = ("marital_stat", dict.fromkeys(MARRIED, False) | {"Never married": True})
GROUPS = {
    "income": {"income_50k": ("income_50k", INCOME), "never_married": NEVER_MARRIED},
    "education": {
        "college": ("education", dict.fromkeys(NO_DEGREE, False) | dict.fromkeys(DEGREES, True)),
        "never_married": NEVER_MARRIED,
    },
}


def load_census(
    path: str | os.PathLike,
    *,
    test_file: str | os.PathLike | None = None,
    seed: int = 0,
    group: str = "income",
    without: Sequence[str] = (),
) -> TaskData:
    """Loads UCI Census-Income (KDD) with two binary tasks.

    The tasks are `income_50k` (above 50,000 dollars) or `college` (a degree, Associate's or higher), and
    `never_married`. The columns that they are made of are no features, nor is `instance_weight`. So defined, `college`
    and `never_married` correlate by -0.238 in census-income.test, as in the paper (0.2373 in absolute value); counting
    "Some college but no degree" would make it -0.281, leaving out the Associate's degrees -0.196.

    The features are age, num_emp, weeks_worked and the four columns of money (these as log(1 + x), being heavy-tailed),
    standardised, and all other columns one-hot: the codes of industry, occupation, veteran's benefits, own_or_self and
    the year are categories too, and so is "?". Means, deviations and categories are those of the training split; any
    other category is read as the column's unknown one, and counted in `notes`.

    Args:
        path: the file, plain or gzip, in the layout of `census-income.data` and `census-income.test`: 42 columns,
            no header. Without `test_file` it is split 60/20/20 at random.
        test_file: `census-income.test`, if `path` is `census-income.data`: then all of `path` is the training split,
            and the halves of this file, at random, the other two, as in the paper.
        seed: 0 or more; fixes the splits.
        group: `income` or `education`.
        without: further columns to leave out, such as `education` in the group `income`.

    Returns:
        The tasks; the features are those of `TableEncoder.transform`.

    Raises:
        ValueError: an argument is unknown, a file is missing or damaged, a line has more or fewer columns, a number is
            none, a label is unknown, or there are too few rows to split.

    Reference:
        Ma et al., "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts" (2018),
        section 6.3.
    """
    if group not in GROUPS:
        raise ValueError(f"group {group!r} is unknown: expected one of {', '.join(GROUPS)}")
    if seed != int(seed) or seed < 0:
        raise ValueError(f"seed is {seed}, expected an integer of at least 0")
    unknown = [name for name in without if name not in COLUMNS]
    if unknown:
        raise ValueError(f"without names {unknown[0]!r}, which is no column: expected some of {', '.join(COLUMNS)}")
    table = read_table(path, COLUMNS)
    held = table if test_file is None else read_table(test_file, COLUMNS)
    order = np.random.default_rng((seed, 0, 1)).permutation(len(held))
    needed = 3 if test_file is None else 2
    if len(held) < needed:
        raise ValueError(f"{held.path} has {len(held)} rows, too few to split: expected at least {needed}")
    if test_file is None:
        cuts = [len(order) * 3 // 5, len(order) * 4 // 5]
        rows = dict(zip(SPLITS, np.split(order, cuts), strict=True))
        caveat = f"split 60/20/20 by seed {seed}: another split than the papers', so figures do not compare with theirs"
    else:
        rows = dict(zip(SPLITS, (np.arange(len(table)), *np.split(order, [len(order) // 2])), strict=True))
        caveat = f"valid and test are the halves of {held.path}, by seed {seed}, as in the MMoE paper"
    tables = {"train": table, "valid": held, "test": held}
    labels = GROUPS[group]
    dropped = {WEIGHT, *without, *(column for column, _ in labels.values())}
    numeric = [name for name in NUMERIC if name not in dropped]
    categorical = [name for name in COLUMNS if name not in dropped | set(NUMERIC)]
    encoder = TableEncoder.fit(table, rows["train"], numeric, categorical, log=MONEY)
    splits = {name: _split(tables[name], rows[name], encoder, labels) for name in SPLITS}
    sizes = ", ".join(f"{len(rows[name]):,} {name}" for name in SPLITS)
    notes = [f"{table.path} ({sizes}; {len(numeric) + len(categorical)} columns, {encoder.width} features)", caveat]
    for name in ("valid", "test"):
        for column, found in encoder.unseen(tables[name], rows[name]).items():
            notes.append(f"{name}: {column} of {found} is not in train, read as unknown")
    tasks: dict[str, Task] = {name: Binary() for name in labels}
    return TaskData(f"census_{group}", **splits, tasks=tasks, encode=encoder.encode, notes=tuple(notes))


def _split(
    table: Table, rows: np.ndarray, encoder: TableEncoder, labels: dict[str, tuple[str, dict[str, bool]]]
) -> TaskSplit:
    flags = {task: table.flags(column, meaning)[rows] for task, (column, meaning) in labels.items()}
    return TaskSplit(encoder.transform(table, rows), flags)
