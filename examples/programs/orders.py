"""Orders joined with customers and products, and summed up in several ways: pandas, one process.

All sums are of integers (amounts are cents), so the order in which they are added does not matter.
"""

from argparse import ArgumentParser

import numpy as np
import pandas as pd

REGIONS = 12
CATEGORIES = 40
PRODUCTS = 50_000
DAYS = 730


def orders(rows: int, customers: int, chance: np.random.Generator) -> pd.DataFrame:
    """Make a table of orders: few customers order often, few products sell well, days come in order."""
    return pd.DataFrame(
        {
            "day": np.sort(chance.integers(0, DAYS, rows, dtype=np.int16)),
            "customer": (chance.random(rows) ** 3 * customers).astype(np.int32),
            "product": (chance.random(rows) ** 2 * PRODUCTS).astype(np.int32),
            "quantity": chance.geometric(0.4, rows),
        },
    )


def digest(table: pd.DataFrame) -> str:
    """Return a checksum of all of a table."""
    values = pd.util.hash_pandas_object(table).to_numpy()
    return f"{int(values.sum(dtype=np.uint64)):016x}"


def main() -> None:
    """Print what came out, step by step."""
    parser = ArgumentParser()
    parser.add_argument("--rows", type=int, default=14_000_000)
    rows = parser.parse_args().rows
    chance = np.random.default_rng(1)
    count = max(rows // 40, 1)
    table = orders(rows, count, chance)
    customers = pd.DataFrame(
        {
            "customer": chance.permutation(count).astype(np.int32),
            "region": chance.integers(0, REGIONS, count, dtype=np.int8),
            "since": chance.integers(1990, 2024, count, dtype=np.int16),
        }
    )
    products = pd.DataFrame(
        {
            "product": chance.permutation(PRODUCTS).astype(np.int32),
            "category": chance.integers(0, CATEGORIES, PRODUCTS, dtype=np.int8),
            "cents": chance.integers(99, 99_999, PRODUCTS),
        }
    )
    print(f"{rows:,} orders of {count:,} customers: {digest(table)}", flush=True)

    joined = table.merge(products, on="product").merge(customers, on="customer")
    joined["amount"] = joined["quantity"] * joined["cents"]
    print(f"joined, {joined['amount'].sum():,} cents: {digest(joined)}", flush=True)

    months = joined.assign(month=joined["day"] // 30)
    sales = months.groupby(["region", "category", "month"], as_index=False).agg(
        amount=("amount", "sum"), orders=("quantity", "size"), largest=("amount", "max"), since=("since", "min")
    )
    print(f"{len(sales):,} groups of region, category and month: {digest(sales)}", flush=True)

    best = months.groupby("customer")["amount"].sum().sort_values(ascending=False, kind="stable").head(1000)
    print(f"the best customers' share: {best.sum():,} cents: {digest(best.reset_index())}", flush=True)

    gap = joined.groupby("customer")["day"].diff().dropna().astype(np.int64)
    print(f"{len(gap):,} orders followed another after {int(gap.sum()):,} days in all: {digest(gap.to_frame())}")


if __name__ == "__main__":
    main()
