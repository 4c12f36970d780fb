from conftest import User


async def test_users_are_real(ada: User, bob: User, admin: User):
    assert ada.id != bob.id
    me = await ada.post("http://host/auth/jwt/logout")
    assert me.status_code == 204
