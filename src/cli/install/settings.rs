//! Settings in a TOML file of a person: each is set alone and undone alone, and all else stays as it is, with its comments.

use serde::{Deserialize, Serialize};
use toml_edit::{ArrayOfTables, DocumentMut, InlineTable, Item, Table, Value};

use crate::error::{Error, Kind, Result, ResultExt as _};

/// A value at a path, or an element that a list at a path has.
#[derive(Clone)]
pub(super) struct Setting {
    pub(super) path: Vec<String>,
    pub(super) value: Value,
    pub(super) is_element: bool,
}

/// What was changed for a setting: enough to undo it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub(super) struct Done {
    path: Vec<String>,
    value: String,
    before: Option<String>,
    is_element: bool,
    /// How many tables of the path were there before.
    existing: usize,
}

impl Setting {
    pub(super) fn new(path: &[&str], value: impl Into<Value>) -> Self {
        Self {
            path: path.iter().map(|&name| name.to_owned()).collect(),
            value: value.into(),
            is_element: false,
        }
    }

    pub(super) fn element(path: &[&str], pairs: &[(&str, &str)]) -> Self {
        let element: InlineTable = pairs.iter().copied().collect();
        Self {
            is_element: true,
            ..Self::new(path, element)
        }
    }

    /// Changes the file so that it has the setting. Returns nothing if it has it already.
    pub(super) fn apply(&self, document: &mut DocumentMut) -> Result<Option<Done>> {
        let refused = || {
            let path = self.path.join(".");
            let what = format!("{path} is set in a form that cannot be changed: set it by hand");
            Error::new(Kind::Unsupported, what)
        };
        let (name, parents) = self.path.split_last().ok_or_else(refused)?;
        let mut existing = 0;
        let mut item = document.as_item_mut();
        for parent in parents {
            let is_inline = item.is_inline_table();
            let table = item.as_table_like_mut().ok_or_else(refused)?;
            if table.contains_key(parent) {
                existing += 1;
            } else {
                table.insert(parent, new_table(is_inline));
            }
            item = table.get_mut(parent).ok_or_else(refused)?;
        }
        let is_inline = item.is_inline_table();
        let table = item.as_table_like_mut().ok_or_else(refused)?;
        let mut done = Done {
            path: self.path.clone(),
            value: plain(&self.value),
            before: None,
            is_element: self.is_element,
            existing,
        };
        match (self.is_element, table.get_mut(name)) {
            (false, Some(Item::Value(old))) => {
                if is_same(old, &self.value) {
                    return Ok(None);
                }
                done.before = Some(plain(old));
                replace(old, self.value.clone());
            }
            (false, None) => {
                table.insert(name, Item::Value(self.value.clone()));
            }
            (true, Some(Item::Value(Value::Array(list)))) => {
                if list.iter().any(|element| is_same(element, &self.value)) {
                    return Ok(None);
                }
                list.push(self.value.clone());
            }
            (true, Some(Item::ArrayOfTables(list))) => {
                if position(list, &self.value).is_some() {
                    return Ok(None);
                }
                list.push(element(&self.value).ok_or_else(refused)?);
            }
            (true, None) if !is_inline => {
                let mut list = ArrayOfTables::new();
                list.push(element(&self.value).ok_or_else(refused)?);
                table.insert(name, Item::ArrayOfTables(list));
            }
            _ => return Err(refused()),
        }
        Ok(Some(done))
    }
}

impl Done {
    /// Takes the change back, if the file still has it.
    pub(super) fn undo(&self, document: &mut DocumentMut) -> Result<()> {
        let value = parse(&self.value)?;
        let Some((name, parents)) = self.path.split_last() else {
            return Ok(());
        };
        let Some(table) = find(document, parents).and_then(Item::as_table_like_mut) else {
            return Ok(());
        };
        let is_empty = match table.get_mut(name) {
            Some(Item::Value(Value::Array(list))) if self.is_element => {
                list.retain(|element| !is_same(element, &value));
                false // `apply` makes no such list: an empty one was there before
            }
            Some(Item::ArrayOfTables(list)) if self.is_element => {
                if let Some(at) = position(list, &value) {
                    list.remove(at);
                }
                list.is_empty()
            }
            Some(Item::Value(now)) if !self.is_element && is_same(now, &value) => {
                if let Some(before) = &self.before {
                    replace(now, parse(before)?);
                }
                self.before.is_none()
            }
            _ => false,
        };
        if is_empty {
            table.remove(name);
        }
        for depth in (self.existing..parents.len()).rev() {
            let above = find(document, &parents[..depth]).and_then(Item::as_table_like_mut);
            let Some(above) = above else { break };
            let made = above.get(&parents[depth]).and_then(Item::as_table_like);
            if made.is_some_and(|made| made.is_empty()) {
                above.remove(&parents[depth]);
            }
        }
        Ok(())
    }
}

/// The item at a path, if there is one.
pub(super) fn at<'a>(document: &'a DocumentMut, path: &[&str]) -> Option<&'a Item> {
    let mut item = document.as_item();
    for name in path {
        item = item.as_table_like()?.get(name)?;
    }
    Some(item)
}

fn find<'a>(document: &'a mut DocumentMut, path: &[String]) -> Option<&'a mut Item> {
    let mut item = document.as_item_mut();
    for name in path {
        item = item.as_table_like_mut()?.get_mut(name)?;
    }
    Some(item)
}

fn new_table(is_inline: bool) -> Item {
    if is_inline {
        return Item::Value(Value::InlineTable(InlineTable::new()));
    }
    let mut table = Table::new();
    // no header of its own unless it has values
    table.set_implicit(true);
    Item::Table(table)
}

/// An element of a list of tables.
fn element(value: &Value) -> Option<Table> {
    Some(value.as_inline_table()?.clone().into_table())
}

fn position(list: &ArrayOfTables, value: &Value) -> Option<usize> {
    let is_it = |table: &Table| {
        let table = Value::InlineTable(table.clone().into_inline_table());
        is_same(&table, value)
    };
    list.iter().position(is_it)
}

/// Replaces a value. The comments around it stay.
fn replace(old: &mut Value, mut new: Value) {
    *new.decor_mut() = old.decor().clone();
    *old = new;
}

fn plain(value: &Value) -> String {
    let mut value = value.clone();
    value.decor_mut().clear();
    value.to_string()
}

fn parse(text: &str) -> Result<Value> {
    text.parse::<Value>()
        .or_kind(Kind::Corrupt, || format!("value {text:?} of the record"))
}

/// Whether two values mean the same, however they are written.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::String(one), Value::String(other)) => one.value() == other.value(),
        (Value::Boolean(one), Value::Boolean(other)) => one.value() == other.value(),
        (Value::Array(one), Value::Array(other)) => {
            let pairs = || one.iter().zip(other);
            one.len() == other.len() && pairs().all(|(one, other)| is_same(one, other))
        }
        (Value::InlineTable(one), Value::InlineTable(other)) => {
            let has = |(name, value): (&str, &Value)| {
                other.get(name).is_some_and(|other| is_same(value, other))
            };
            one.len() == other.len() && one.iter().all(has)
        }
        (one, other) => plain(one) == plain(other),
    }
}
