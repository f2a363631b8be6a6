//! Tables without borders, and lists of fields.

use comfy_table::Table;
use comfy_table::presets::NOTHING;

/// Blanks between columns.
const GAP: u16 = 3;

/// A table with upper-case headers.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header).add_rows(rows);
    render(table)
}

/// Fields of one object, one below the other.
pub(crate) fn fields<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.add_rows(fields.into_iter().map(|(name, value)| [format!("{name}:"), value]));
    render(table)
}

fn render(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    table.trim_fmt()
}

/// A value that may be absent.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_without_borders_or_trailing_blanks() {
        let rows = [["demo/hello", "running"], ["a", "b"]].map(|row| row.map(str::to_owned));
        let text = table(["NAME", "STATE"], rows);
        assert_eq!(text, "NAME         STATE\ndemo/hello   running\na            b");
        assert_eq!(table(["NAME"], []), "NAME");
    }

    #[test]
    fn fields_are_named() {
        let text = fields([("name", "demo".to_owned()), ("pid", or_dash::<u32>(None))]);
        assert_eq!(text, "name:   demo\npid:    -");
    }
}
