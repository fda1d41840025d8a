//! Pages of a list: a cursor is the id of the last row seen, so that inserts do not shift a page.

use serde::Serialize;

/// One page, and where the next begins.
#[derive(Debug, Serialize)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// The cursor of the next page; `None` at the end.
    pub next: Option<String>,
}

impl<T> Page<T> {
    /// Makes a page of at most `limit` out of rows fetched with a limit of [`fetch_limit`].
    pub fn cut(mut rows: Vec<T>, limit: Option<i64>, cursor_of: impl Fn(&T) -> String) -> Self {
        let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
        let next = if rows.len() > limit {
            rows.truncate(limit);
            rows.last().map(cursor_of)
        } else {
            None
        };
        Self { rows, next }
    }
}

/// How many rows to fetch for a page: one more tells whether there is a next page. `None` fetches all.
pub fn fetch_limit(limit: Option<i64>) -> Option<i64> {
    limit.map(|n| n + 1)
}
