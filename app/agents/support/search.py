"""The shop's help articles: Markdown files, ranked by Postgres' full-text search."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.domain.tool import Database

_FOLDER = Path(__file__).with_name("articles")


@dataclass(frozen=True, slots=True)
class Article:
    """`id` is the file's name without its ending, `title` its heading; answers cite the id."""

    id: str
    title: str
    body: str


@cache
def load_articles() -> dict[str, Article]:
    """Every article by its id."""
    articles = {}
    for file in sorted(_FOLDER.glob("*.md")):
        heading, _, body = file.read_text(encoding="utf-8").partition("\n")
        articles[file.stem] = Article(file.stem, heading.removeprefix("# "), body.strip())
    return articles


# So few articles need no table and no index: they travel with the query, and what is searched is what is in the folder.
# Articles with all the words (or as the quotes, "or" and "-" in the query say) come first, then those with any of them.
_RANK = """
    WITH question AS (
        SELECT websearch_to_tsquery('english', :query) AS all_words,
               CAST(replace(CAST(plainto_tsquery('english', :query) AS text), '&', '|') AS tsquery) AS any_word
    ), article AS (
        SELECT id,
               setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('english', body), 'C') AS words
        FROM unnest(CAST(:ids AS text[]), CAST(:titles AS text[]), CAST(:bodies AS text[])) AS file (id, title, body)
    )
    SELECT id FROM article, question
    WHERE words @@ all_words OR words @@ any_word
    ORDER BY words @@ all_words DESC, ts_rank_cd(words, any_word) DESC, id
    LIMIT :limit
"""


async def find_articles(db: Database, query: str, *, limit: int) -> Sequence[Article]:
    """The articles that fit the query best, best first."""
    articles = load_articles()
    rows = await db.fetch_all(
        _RANK,
        {
            "query": query,
            "ids": list(articles),
            "titles": [article.title for article in articles.values()],
            "bodies": [article.body for article in articles.values()],
            "limit": limit,
        },
    )
    return [articles[row["id"]] for row in rows]
