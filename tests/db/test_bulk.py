"""Values on their way into the database, whatever characters they have."""

from ledger_rows import ask, done

from archfront.db.ledger import Ledger
from archfront.db.queries import evaluation_rows
from archfront.db.records import FinishedRecord
from archfront.db.writer import JobWriter

WORDS = ["", "NULL", 'a "quoted" \\ word', "{1,2}", "back\\\\slash\\", "comma, 'apostrophe'\n\ttab", "ü–漢字🙂"]


def test_any_text_arrives_as_it_was(ledger: Ledger, job: int, writer: JobWriter) -> None:
    asked = ask(0, 0, len(WORDS))
    asked.genotypes = [[word, None, {"k": word}] for word in WORDS]
    finished = [
        FinishedRecord(number=n, fidelity=0, state="failed", attempts=1, error=word, worker=None if n % 2 else word)
        for n, word in enumerate(WORDS)
    ]
    writer.commit([asked], finished)
    with ledger.engine.connect() as connection:
        rows = evaluation_rows(connection, job, range(len(WORDS)))
        found = connection.exec_driver_sql("SELECT error, worker FROM evaluations ORDER BY number").all()
    assert [row["genotype"] for row in rows] == asked.genotypes
    assert [row[0] for row in found] == WORDS
    assert [row[1] for row in found] == [None if n % 2 else word for n, word in enumerate(WORDS)]


def test_numbers_arrive_exactly(ledger: Ledger, job: int, writer: JobWriter) -> None:
    values = [0.1, 1e-300, -1.7976931348623157e308, 5e-324, 2.0**53 + 2]
    finished = [done(n, {"gain": v, "cost": 1.0}, violation=abs(v)) for n, v in enumerate(values)]
    for record, value in zip(finished, values, strict=True):
        record.duration_s = None if value == 0.1 else value
    writer.commit([ask(0, 0, len(values))], finished)
    with ledger.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT violation, duration_s FROM evaluations ORDER BY number").all()
    assert [row[0] for row in found] == [abs(v) for v in values]
    assert [row[1] for row in found] == [None, *values[1:]]


def test_known_candidates_keep_their_ids(ledger: Ledger, job: int, writer: JobWriter) -> None:
    first, second = ask(0, 0, 3), ask(1, 3, 3)
    second.keys, second.fidelities = [first.keys[2], f"{99:032x}", first.keys[0]], [1, 1, 1]
    writer.commit([first])
    writer.commit([second])
    with ledger.engine.connect() as connection:
        query = "SELECT candidate_id FROM evaluations ORDER BY number"
        ids = [row[0] for row in connection.exec_driver_sql(query)]
    assert ids[3] == ids[2]
    assert ids[5] == ids[0]
    assert len(set(ids)) == 4
